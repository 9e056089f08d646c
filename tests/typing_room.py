"""A folder in which bash types commands: `musekit`, its Python and its launchers are asked of one server,
which has imported the slow libraries and forks for each of them; everything else about a command is as in a
process of its own."""
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
import venv
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = {{
    "module": {module!r}, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ),
}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
sys.exit(int(server.recv(16) or b"1"))
"""
PRELOADED = [
    "musekit.recipes.memory",
    "musekit.recipes.survey",
    "musekit.recipes.demo",
    "musekit.recipes.encode",
    "musekit.evaluation.evaluate",
    "musekit.plots",
    "musekit.inference.sheets",
    "musekit.cli",
    "musekit.shards.command",
    "musekit.models.uvit",
    "sklearn.datasets",
    "sklearn.linear_model",
    "transformers.optimization",
    "torch._dynamo",
    "accelerate.commands.launch",
    "torch.distributed.launcher.api",
]


def run(module, arguments, folder, environment):
    """What `python -m module arguments` does; for a module of None the arguments are Python's own: -m
    MODULE or a file."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = f"{environment['VIRTUAL_ENV']}/bin/python"  # launchers start their processes with it
    if module is None:
        arguments = [argument for argument in arguments if argument != "-u"]
        module, arguments = (arguments[1], arguments[2:]) if arguments[0] == "-m" else (None, arguments)
    sys.argv[:] = [module, *arguments] if module else arguments
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
    "Runs one command in a process of its own and sends its exit status."
    message, handles, _, _ = socket.recv_fds(connection, 1 << 20, 3)
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
            if os.fork() == 0:
                answer(connection)
                os._exit(0)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


MODULES = {
    "musekit": "musekit",
    "musekit-shards": "musekit.shards",
    "accelerate": "accelerate.commands.accelerate_cli",
    "torchrun": "torch.distributed.run",
    "python": None,
}


def make_environment(folder):
    "A virtual environment in `folder` that shares the packages of this one."
    venv.create(folder, with_pip=False, symlinks=True)
    packages, = (folder / "lib").glob("python*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")] + [ROOT]
    (packages / "shared.pth").write_text("\n".join(paths) + "\n")
    for name, module in (
        ("jupyter", "jupyter"),
        ("jupyter-lab", "jupyterlab"),
    ):  # the first looks for the second beside itself
        write_script(folder / "bin" / name, f'#!/bin/sh\nexec "{folder}/bin/python" -m {module} "$@"\n')
    (folder / ".installed").touch()


def write_script(path, text):
    path.unlink(missing_ok=True)  # the environment's python is a link to the system's
    path.write_text(text)
    path.chmod(0o755)


@contextmanager
def typing_room(folder, **environment):
    "Gives a function that has bash run some lines in `folder`, and returns the finished process."
    address = str(folder / ".typed")
    make_environment(folder / ".venv")
    for name, module in MODULES.items():
        write_script(
            folder / ".venv/bin" / name, CLIENT.format(python=sys.executable, address=address, module=module)
        )
    variables = {
        **os.environ,
        **environment,
        "HOME": str(folder / "home"),
        "HF_HOME": str(folder / "home/hub"),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "110",
        "PYTHONPATH": ROOT,
        "VIRTUAL_ENV": str(folder / ".venv"),
    }
    variables["PATH"] = f"{folder}/.venv/bin:{variables['PATH']}"
    variables.pop("HF_HUB_OFFLINE", None)
    (folder / "home").mkdir()
    server = subprocess.Popen([sys.executable, __file__, address], env=variables)

    def type_in(lines):
        command = ["bash", "-e", "-o", "pipefail", "-c", lines]
        return subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    try:
        while not os.path.exists(address):
            assert server.poll() is None, "the server ended"
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.05)
        yield type_in
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
