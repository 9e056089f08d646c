"""A folder in which bash types `musekit` and `musekit-shards`: both are asked of one server, which has imported the slow libraries
and forks for each command; everything else about a command is as in a process of its own."""
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import venv
from contextlib import contextmanager, suppress
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = {{"module": {module!r}, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or b"1"))
"""
PRELOADED = [
    "musekit.check", "musekit.demo", "musekit.encode", "musekit.quality", "musekit.plots", "musekit.sheets", "musekit.commands",
    "musekit.shards.command", "musekit.models.uvit", "sklearn.datasets", "sklearn.linear_model", "transformers.optimization",
]


def run(module, arguments, folder, environment):
    "What `python -m module arguments` does; for a module of None the first argument is a file."
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = [module or arguments[0], *arguments[bool(module is None):]]
    try:
        if module is None:
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def answer(connection):
    "Forks for one command and sends its exit status."
    message, handles, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if not message:
        return
    child = os.fork()
    if child == 0:
        connection.close()
        for number, handle in enumerate(handles):
            os.dup2(handle, number)
            os.close(handle)
        status = run(**json.loads(message))
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    for handle in handles:
        os.close(handle)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        connection.send(str(os.waitstatus_to_exitcode(status) % 256).encode())


def serve(address):
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(address)
    server.listen()
    while True:
        connection, _ = server.accept()
        with connection:
            answer(connection)


def make_environment(folder, address):
    "A virtual environment in `folder` that shares this one's packages, with the clients as its commands."
    venv.create(folder, with_pip=False, symlinks=True)
    packages, = (folder / "lib").glob("python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")] + [str(Path(__file__).resolve().parent.parent)]
    (packages / "shared.pth").write_text("\n".join(paths) + "\n")
    names = {"musekit": "musekit", "musekit-shards": "musekit.shards", "python-file": None}
    for name, module in names.items():
        write_script(folder / "bin" / name, CLIENT.format(python=sys.executable, address=address, module=module))
    for name, module in {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run", "jupyter": "jupyter"}.items():
        write_script(folder / "bin" / name, f'#!/bin/sh\nexec "{folder}/bin/python" -m {module} "$@"\n')
    (folder / ".installed").touch()


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@contextmanager
def typing_room(folder, **environment):
    "Gives a function that has bash run some lines in `folder`, and returns the finished process."
    address = str(folder / ".typed")
    make_environment(folder / ".venv", address)
    variables = {**os.environ, **environment, "HOME": str(folder / "home"), "HF_HOME": str(folder / "home/hub"), "OMP_NUM_THREADS": "1",
                 "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "110"}
    variables["PATH"] = f"{folder}/.venv/bin:{variables['PATH']}"
    for name in ("HF_HUB_OFFLINE", "PYTHONPATH"):
        variables.pop(name, None)
    (folder / "home").mkdir()
    root = str(Path(__file__).resolve().parent.parent)
    server = subprocess.Popen([sys.executable, __file__, address], env={**variables, "PYTHONPATH": root})

    def type_in(lines):
        command = ["bash", "-e", "-o", "pipefail", "-c", lines]
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the server ended"
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.05)
        yield type_in
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
