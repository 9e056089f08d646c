"""Opens notebooks in a real JupyterLab in a real browser, runs all cells, moves their widgets, and fails on
any error.

    python tests/lab.py                        every notebook
    python tests/lab.py 03_sampling 40_pipeline  some of them

Needs Chromium, its driver and selenium; --install, which `make test-lab` gives, fetches the first two from
Debian. The notebooks are run as copies; screenshots go to `screenshots/`, which git ignores.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait
from tqdm import tqdm

from lab_moves import MOVES, Panel

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "screenshots"

RUN_ALL = """
const app = window.jupyterapp, done = said => { window.musekitRun = said; };
const wait = async (test) => { while (!test()) await new Promise(r => setTimeout(r, 100)); };
(async () => {
    await wait(() => app.shell.currentWidget?.context?.isReady);
    const panel = app.shell.currentWidget;
    await panel.sessionContext.ready;
    app.shell.collapseLeft();
    await app.commands.execute('notebook:run-all-cells');
    done('ran');
})().catch(error => done('failed: ' + error));
"""

OUTPUTS = """
const cells = window.jupyterapp.shell.currentWidget.content.model.cells, found = [];
for (let i = 0; i < cells.length; i++) {
    const cell = cells.get(i).toJSON();
    if (cell.cell_type !== 'code') continue;
    const kindOf = o => o.output_type === 'error' ? `${o.ename}: ${o.evalue}` : o.output_type;
    const source = cell.source.join ? cell.source.join('') : cell.source;
    const kinds = cell.outputs.map(kindOf);
    found.push({number: i, ran: cell.execution_count !== null, kinds: kinds, head: source.slice(0, 80)});
}
return found;
"""


@contextmanager
def jupyter(folder: Path):
    """Yields the address of a JupyterLab that serves a folder, with its application open to scripts."""
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1",
        "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}",
        "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as settings:
        quiet = Path(settings) / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": settings}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)
        try:
            for _ in range(600):
                log.seek(0)
                address = re.search(r"http://127\.0\.0\.1:\d+", log.read())
                if address or server.poll() is not None:
                    break
                time.sleep(0.1)
            if not address:
                log.seek(0)
                raise RuntimeError(f"JupyterLab did not start:\n{log.read()[-2000:]}")
            yield address[0]
        finally:
            server.terminate()
            server.wait()


def missing_packages() -> list[str]:
    """Debian's packages that are not here."""
    return [
        package
        for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver"))
        if not shutil.which(program)
    ]


def find_browser(install: bool):
    """Sees to it that Chromium and its driver are here; a line that ends the program says what to do where
    they are not."""
    if not (missing := missing_packages()):
        return
    complaint = f"this needs {' and '.join(missing)}"
    if not install:
        raise SystemExit(
            f"{complaint}: make test-lab installs them where it can, or apt-get install {' '.join(missing)}"
        )
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if any(not shutil.which(program) for program in ("apt-get", *sudo)):
        raise SystemExit(
            f"{complaint}, and there is no {' or no '.join(['apt-get', *sudo])} here to install it with;"
            " install Chromium and its driver"
        )
    print(f"installing {' and '.join(missing)} ...", flush=True)
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(
            [*sudo, "apt-get", "--quiet=2", *command], env=environment, stdout=subprocess.DEVNULL
        ).returncode:
            raise SystemExit(f"{complaint}, and apt-get {command[0]} failed; install them by hand")


@contextmanager
def browser():
    """Yields a headless Chromium."""
    options = Options()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1600"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    chromium = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield chromium
    finally:
        chromium.quit()


def run_notebook(chromium, address: str, name: str, seconds: int) -> list[str]:
    """What went wrong in a notebook whose cells were all run; empty if nothing did."""
    chromium.get(f"{address}/lab/tree/{name}.ipynb?reset")
    chromium.set_script_timeout(60)
    WebDriverWait(chromium, 120).until(lambda c: c.execute_script("return Boolean(window.jupyterapp)"))
    chromium.execute_script(RUN_ALL)
    try:
        said = WebDriverWait(chromium, seconds, 0.5).until(
            lambda c: c.execute_script("return window.musekitRun")
        )
    except TimeoutException:
        return [f"not done after {seconds} s"]
    cells = chromium.execute_script(OUTPUTS)
    shot = SHOTS / f"{name}.png"
    shot.parent.mkdir(exist_ok=True)
    chromium.save_screenshot(str(shot))
    problems = [] if said == "ran" else [said]
    problems += [f"cell {c['number']} ({c['head']!r}): {k}" for c in cells for k in c["kinds"] if ": " in k]
    problems += [f"cell {c['number']} did not run" for c in cells if not c["ran"] and c["head"].strip()]
    if name in MOVES and not problems:
        problems += move_widgets(chromium, name)
    chromium.execute_async_script(
        "const done = arguments[0];"
        " window.jupyterapp.shell.currentWidget.sessionContext.shutdown().then(done, done);"
    )
    return problems


def move_widgets(chromium, name: str) -> list[str]:
    """What went wrong when the widgets of a notebook were moved; empty if nothing did."""
    folder = SHOTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        MOVES[name](lambda source: Panel(chromium, source, folder))
    except (AssertionError, WebDriverException) as error:
        chromium.save_screenshot(str(folder / "failed.png"))
        return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb (default: all)")
    parser.add_argument(
        "--seconds", type=int, default=1200, help="longest time for a notebook (default: %(default)s)"
    )
    parser.add_argument(
        "--install",
        action="store_true",
        help="install Chromium and its driver with apt-get if they are missing",
    )
    options = parser.parse_args()
    notebooks = (path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb"))
    every_name = sorted(
        path.with_suffix("").as_posix() for path in notebooks if ".ipynb_checkpoints" not in path.parts
    )
    names = options.names or every_name
    if unknown := set(names) - set(every_name):
        raise SystemExit(f"no notebook {', '.join(unknown)}; there are {', '.join(every_name)}")
    find_browser(options.install)
    SHOTS.mkdir(exist_ok=True)
    os.environ.setdefault("MUSEKIT_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    os.environ.setdefault("MUSEKIT_DEMO", str(ROOT / "runs" / "demo"))
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        for part in ("nbs", "musekit", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("runs", "__pycache__"))
        shutil.copy(ROOT / "settings.ini", copy)
        with jupyter(copy / "nbs") as address, browser() as chromium:
            for name in (bar := tqdm(names)):
                bar.set_description(name)
                started = time.perf_counter()
                failed[name] = run_notebook(chromium, address, name, options.seconds)
                tqdm.write(
                    f"{name}: {'; '.join(failed[name]) or 'ok'} ({time.perf_counter() - started:.0f} s)"
                )
    wrong = [name for name in names if failed[name]]
    print(f"{len(names) - len(wrong)} of {len(names)} notebooks ran without an error")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
