"""Temporary draft: replaced by the notebook's export."""
import functools, inspect, json
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
from safetensors.torch import load_file, save_file

class PretrainedModel(nn.Module):
    ignored_config = set()
    def __init_subclass__(cls):
        init = cls.__init__
        sig = inspect.signature(init)
        @functools.wraps(init)
        def wrapped(self, *a, **k):
            b = sig.bind(self, *a, **k); b.apply_defaults()
            d = dict(b.arguments); d.pop("self")
            nn.Module.__init__(self)
            self._cfg = d
            object.__setattr__(self, "config", SimpleNamespace(**d))
            init(self, *a, **k)
        cls.__init__ = wrapped
    @classmethod
    def from_pretrained(cls, folder):
        folder = Path(folder)
        c = json.loads((folder/"config.json").read_text())
        names = inspect.signature(cls.__init__).parameters
        m = cls(**{k: v for k, v in c.items() if k in names})
        p = folder/"model.safetensors"
        sd = load_file(p) if p.exists() else torch.load(folder/"pytorch_model.bin", weights_only=True)
        m.load_state_dict(sd)
        return m.eval()
    def save_pretrained(self, folder):
        folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
        (folder/"config.json").write_text(json.dumps(self._cfg))
        save_file(self.state_dict(), folder/"model.safetensors")
