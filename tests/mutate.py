"""Changes a module a little, many times over, and asks whether its tests notice.

A test that no change of the code can fail guards nothing. This script makes small mutations of a module, one
at a time (a comparison turned, a constant changed, an operator exchanged, a condition negated, a statement
left out, a value not returned), and runs for each what guards the module: the test cells of its notebook,
then the test files named in GUARDS. The first failure, or running out of time, kills a mutation; one that
passes everything survives, and is shown with its line. It is not part of `make test`: a module takes minutes.

    python tests/mutate.py core.masking                           every mutation of musekit/core/masking.py
    python tests/mutate.py core.masking core.losses --sample 40   forty of each, drawn by --seed
    python tests/mutate.py data.samples --list                    what would be changed; nothing is run
    python tests/mutate.py shards.store --only 120-180            mutations in these lines alone
    python tests/mutate.py training.checkpoint --tests tests/test_going_on.py

The libraries are imported once, and the notebook's test cells run inside of the module, in order; cells
marked `#| slow` are skipped. What an export cell defines cannot be used above it, so that nothing there need
be run again: when the walk through the notebook comes to an export cell, each of its mutations is a forked
child that defines the module anew from the changed statement on and runs the test cells below, the nearest
first, and then the test files. `--whole` runs everything for each mutation instead, for a module that cannot
be defined twice. Tests that start processes of their own run the unchanged module there, and say nothing
about a mutation. Functions named `plot_...` are left out (a figure is looked at), as are annotations,
docstrings, and the words of errors and warnings.

Mutations that change nothing, or nothing that a test could see, stand in tests/mutants.txt with the reason, a
line each: MODULE | the change as it is shown, or * for any | the code line | why. They count as explained.
"""
import argparse
import ast
import contextlib
import copy
import importlib
import importlib.util
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED = ROOT / "tests" / "mutants.txt"
GUARDS = {  # module -> test files beside its notebook, those that run in one process
    "core.noise": ["test_samplers.py"],
    "core.samplers": ["test_samplers.py"],
    "core.decoding": ["test_samplers.py"],
    "core.guidance": ["test_samplers.py"],
    "models.pretrained": ["test_checkpoints.py"],
    "data.text_tokenizers": ["test_text_data.py"],
    "data.text": ["test_text_data.py"],
    "models.text_transformer": ["test_text_transformer.py"],
    "models.mdlm": ["test_golden_mdlm.py"],
    "training.checkpoint": ["test_going_on.py"],
    "training.loop": ["test_going_on.py"],
    "shards.rechunk": ["test_shards_rechunk.py"],
    "shards.store": ["test_shards_store.py"],
}


# Mutations


@dataclass
class Mutation:
    "One change, and how to show it; the tree with it is made when it is wanted."

    line: int
    change: str
    unchanged: ast.Module
    path: tuple
    new: ast.AST

    @property
    def tree(self) -> ast.Module:
        return put(self.unchanged, self.path, self.new)


COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}


def replacements(node, assigned):
    "Nodes that may stand where `node` does, `ast.Pass` for a statement left out."
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for kind in COMPARISONS[type(node.ops[0])]:
            yield ast.Compare(node.left, [kind()], node.comparators)
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for kind in COMPARISONS[type(operator)]:
                yield ast.Compare(
                    node.left, [*node.ops[:place], kind(), *node.ops[place + 1 :]], node.comparators
                )
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
            yield from (node.left, node.right)
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if type(node.op) in OPERATORS:
            yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for place in range(len(node.values)):
            rest = node.values[:place] + node.values[place + 1:]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        if not (
            isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int)
        ):  # -1, the last axis
            yield node.operand
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, other_constants(node.value))
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    elif isinstance(node, ast.comprehension) and node.ifs:
        for place in range(len(node.ifs)):
            yield ast.comprehension(
                node.target, node.iter, node.ifs[:place] + node.ifs[place + 1 :], node.is_async
            )
    elif isinstance(node, ast.Return) and not (node.value is None or is_none(node.value)):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    elif isinstance(node, (ast.Raise, ast.Delete, ast.Assert)) or (
        isinstance(node, ast.Expr) and not is_text(node)
    ):
        yield ast.Pass()
    elif isinstance(node, ast.Assign) and (
        any(not isinstance(target, ast.Name) for target in node.targets) or names_in(node.targets) & assigned
    ):
        if not any(
            isinstance(target, ast.Tuple) and not names_in([target]) <= assigned for target in node.targets
        ):
            yield ast.Pass()


def other_constants(value):
    "Constants of the same kind."
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1] if value < 2 else [value + 1, value - 1]
    if isinstance(value, float):
        return [value + 1.0] if value == 0 else [value * 2]
    return [value + "X"] if isinstance(value, str) and value else []


def is_text(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def names_in(nodes):
    return {inner.id for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Name)}


SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "exc", "cause", "type_comment"}


def places(node, path=(), assigned=frozenset()):
    """Every node that may be changed, with the way to it from the root and the names that were assigned
    before."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if node.name.startswith(("plot_", "_plot_")):
            return
        arguments = node.args
        parameters = [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]
        assigned = frozenset(argument.arg for argument in parameters if argument)
    for field, value in ast.iter_fields(node):
        if field in SKIPPED_FIELDS or (isinstance(node, ast.Call) and is_warning(node)):
            continue
        if isinstance(value, list):
            seen = set(assigned)
            for number, each in enumerate(value):
                if isinstance(each, ast.AST) and not is_text(each) and not is_all(each):
                    yield each, (*path, (field, number)), frozenset(seen)
                    yield from places(each, (*path, (field, number)), frozenset(seen))
                    seen |= names_in(getattr(each, "targets", []))
        elif isinstance(value, ast.AST) and not isinstance(node, ast.JoinedStr):
            yield value, (*path, (field, None)), assigned
            yield from places(value, (*path, (field, None)), assigned)


def is_warning(call):
    return ast.unparse(call.func) in ("warnings.warn", "warn", "setting")


def is_all(node):
    return isinstance(node, ast.Assign) and names_in(node.targets) == {"__all__"}


def put(tree, path, new):
    "A copy of the tree with another node at the end of the path."
    tree = copy.deepcopy(tree)
    node = tree
    for field, number in path[:-1]:
        node = getattr(node, field) if number is None else getattr(node, field)[number]
    field, number = path[-1]
    if number is None:
        setattr(node, field, new)
    else:
        getattr(node, field)[number] = new
    return ast.fix_missing_locations(tree)


def mutations(source):
    "All mutations of a module's source, in the order of its lines."
    tree, result = ast.parse(source), []
    for node, path, assigned in places(tree):
        line = getattr(node, "lineno", None) or getattr(getattr(node, "target", None), "lineno", 0)
        if not line or isinstance(node, ast.JoinedStr):
            continue
        for new in replacements(node, assigned):
            before = first_line(node)
            change = f"{before} -> {'(left out)' if isinstance(new, ast.Pass) else first_line(new)}"
            result.append(Mutation(line, change, tree, path, new))
    return sorted(result, key=lambda each: each.line)


def first_line(node):
    text = ast.unparse(ast.fix_missing_locations(copy.deepcopy(node)))
    return text.splitlines()[0] if text else ""


# What guards a module


def notebook_cells(name):
    """The notebook that exports a module, and its cells in order: the id of a cell that exports, the code of
    a test cell.

    What is slow is left out.
    """
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [
            (cell["id"], "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"
        ]
        if any(f"#| default_exp {name}\n" in f"{code}\n" for _, code in cells):
            unwanted = ("#| default_exp", "#| slow", "#| eval: false")
            cells = [
                (number, code)
                for number, code in cells
                if not code.lstrip().startswith(unwanted) and "nbdev_export" not in code
            ]
            return path, [
                (number, None) if code.lstrip().startswith(("#| export", "#|export")) else (None, code)
                for number, code in cells
            ]
    raise SystemExit(f"no notebook exports {name!r}")


def by_export_cell(source, mutants):
    "Mutations by the id of the cell that they come from, which nbdev writes above what it exports."
    cell, cells = None, []
    for line in source.splitlines():
        cell = line.rpartition("#")[2] if line.startswith("# %%") and ".ipynb #" in line else cell
        cells.append(cell)
    groups = {}
    for each in mutants:
        groups.setdefault(cells[each.line - 1], []).append(each)
    return groups


def module_path(name):
    return ROOT / "musekit" / f"{name.replace('.', '/')}.py"


def stand_in(name, tree):
    "Makes a syntax tree the module of that name."
    path = module_path(name)
    spec = importlib.util.spec_from_file_location(f"musekit.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"musekit.{name}"] = module
    package, _, own = f"musekit.{name}".rpartition(".")
    setattr(importlib.import_module(package), own, module)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    module.__dict__["display"] = lambda *shown, **options: None
    return module


def from_line(tree, line):
    "The statements of a module from the one that holds a line on."
    return ast.Module([statement for statement in tree.body if statement.end_lineno >= line], [])


def run_cells(module, cells):
    for code in cells:
        exec(compile(code, "<cell>", "exec"), module.__dict__)


def check(module, tree, line, cells, files):
    "Defines a module anew from a line on and runs what guards it from there; raises at the first failure."
    exec(compile(from_line(tree, line), module.__file__, "exec"), module.__dict__)
    run_cells(module, cells)
    if files:
        import pytest

        if pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files]):
            raise AssertionError("pytest")


def in_child(function, limit, folder):
    """Whether a function ends well in a forked child: True, False, or None where it takes longer than the
    limit, in seconds of computing."""
    child = os.fork()
    if not child:
        os.setpgrp()
        silence = os.open(os.environ.get("MUTATE_OUTPUT", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit) + 5))
        tempfile.tempdir = folder
        os.environ["TMPDIR"] = folder
        status = 1
        try:
            function()
            status = 0
        except BaseException as error:
            if "MUTATE_OUTPUT" in os.environ:
                import traceback

                traceback.print_exception(error)
        finally:
            os._exit(status)
    end = time.monotonic() + 20 * limit + 60  # what waits for ever computes nothing; a busy machine is slow
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def computed():
    "Seconds of computing that the children so far have taken."
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def in_clean_child(*arguments):
    "As `in_child`, in a folder of its own; the files that the cells above wrote are afterwards as they were."
    folder, kept = tempfile.mkdtemp(prefix="mutant-"), f"{tempfile.tempdir}-kept"
    try:
        return in_child(*arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tempfile.tempdir)
        shutil.copytree(kept, tempfile.tempdir, symlinks=True)


def keep_files():
    "Copies the temporary folder, for `in_clean_child` to put back."
    kept = f"{tempfile.tempdir}-kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(tempfile.tempdir, kept, symlinks=True)


def preload(name, files):
    "Imports libraries, and what the module itself imports, once for all children."
    import matplotlib

    matplotlib.use("Agg")
    for library in (
        "torch",
        "numpy",
        "matplotlib.pyplot",
        "pytest",
        "_pytest.assertion.rewrite",
        "fastcore.test",
        "PIL.Image",
        "safetensors.torch",
        "IPython.display",
        "pandas",
        "pyarrow.parquet",
        "pyarrow.dataset",
        "omegaconf",
        "webdataset",
        "accelerate",
        "transformers",
        "transformers.optimization",
        "scipy.stats",
        "sklearn.datasets",
        "torch._dynamo",
        "lion_pytorch",
        "duckdb",
        "polars",
        "diffusers",
    ):
        if not name.startswith("shards.") or library in (
            "numpy",
            "pytest",
            "pyarrow.parquet",
            "matplotlib.pyplot",
            "fastcore.test",
            "IPython.display",
            "duckdb",
            "polars",
            "pandas",
            "pyarrow.dataset",
        ):
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    importlib.import_module(f"musekit.{name}")
    del sys.modules[f"musekit.{name}"]


# The run


def explained():
    lines = (
        [
            line
            for line in EXPLAINED.read_text(encoding="utf-8").splitlines()
            if line.strip() and not line.startswith("#")
        ]
        if EXPLAINED.is_file()
        else []
    )
    rows = [[part.strip() for part in line.split(" | ")] for line in lines]
    for row in rows:
        if len(row) != 4:
            raise SystemExit(
                f"{EXPLAINED.name}: a line is MODULE | change | code line | why, not {' | '.join(row)}"
            )
    return {tuple(row[:3]) for row in rows}


def wanted(name, source, options):
    "The mutations of a module that the options ask for."
    mutants = mutations(source)
    low, _, high = (options.only or "0-1000000").partition("-")
    mutants = [each for each in mutants if int(low) <= each.line <= int(high or low)]
    if options.sample and options.sample < len(mutants):
        chosen = set(random.Random(options.seed).sample(range(len(mutants)), options.sample))
        mutants = [each for number, each in enumerate(mutants) if number in chosen]
    return mutants


def stages(cells, groups, whole):
    """Walks through a notebook: the test cells above, the mutations to be tried there, and the test cells
    below."""
    if whole:
        yield [], [each for group in groups.values() for each in group], [code for _, code in cells if code]
        return
    above = []
    for place, (number, code) in enumerate(cells):
        if code:
            above.append(code)
        elif number in groups:
            yield above, groups[number], [code for _, code in cells[place:] if code]
            above = []


def run(name, options):
    "Mutates one module; gives how many mutations there were, were killed, are explained, and the survivors."
    source = module_path(name).read_text(encoding="utf-8")
    lines, mutants = source.splitlines(), wanted(name, source, options)
    if options.list:
        for each in mutants:
            print(f"{name}:{each.line}: {each.change}")
        return len(mutants), 0, 0, []
    excuses = set() if options.all else explained()
    left = [
        each
        for each in mutants
        if not excuses & {(name, change, lines[each.line - 1].strip()) for change in (each.change, "*")}
    ]
    excused = len(mutants) - len(left)
    files = [
        str(ROOT / "tests" / Path(file).name)
        for file in (options.tests if options.tests is not None else GUARDS.get(name, []))
    ]
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="mutants-")
    try:
        preload(name, files)
        killed, survivors = try_all(name, source, left, files, options)
    finally:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        shutil.rmtree(f"{tempfile.tempdir}-kept", ignore_errors=True)
    return excused + killed + len(survivors), killed, excused, survivors


def try_all(name, source, left, files, options):
    "Runs mutations, in the order of the notebook; gives how many were killed, and the survivors."
    tree, lines, groups = ast.parse(source), source.splitlines(), by_export_cell(source, left)
    module = stand_in(name, tree)
    started, killed, survivors = time.monotonic(), 0, []
    notebook, cells = notebook_cells(name)
    os.chdir(notebook.parent)  # where its cells run
    for above, group, below in stages(cells, groups, options.whole):
        run_cells(module, above)
        keep_files()
        before, first = computed(), 0 if options.whole else group[0].line
        if not in_clean_child(lambda: check(module, tree, first, below, files), 600):
            raise SystemExit(
                f"{name}:{first}: its tests fail unchanged; set MUTATE_OUTPUT=FILE to see how, or try --whole"
            )
        once = computed() - before
        limit = options.limit or 3 * once + 5
        print(
            f"{name}:{first}: {len(group)} mutations, tests compute for {once:.1f} s, limit {limit:.0f} s",
            flush=True,
        )
        for each in group:
            if in_clean_child(
                lambda: check(module, each.tree, 0 if options.whole else each.line, below, files), limit
            ):
                survivors.append(each)
                print(
                    f"  survived {name}:{each.line}: {each.change}\n      {lines[each.line - 1].strip()}",
                    flush=True,
                )
            else:
                killed += 1
                if options.verbose:
                    print(f"  killed {name}:{each.line}: {each.change}", flush=True)
            if options.minutes and time.monotonic() - started > 60 * options.minutes:
                print(f"  stopped after {killed + len(survivors)} of {len(left)}", flush=True)
                return killed, survivors
    return killed, survivors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("modules", nargs="+", help="such as core.masking or data.samples")
    add("--tests", nargs="*", help="test files instead of those in GUARDS")
    add("--sample", type=int, help="so many mutations of each module, drawn by chance")
    add("--seed", type=int, default=0, help="of that drawing (default: %(default)s)")
    add("--only", metavar="FROM-TO", help="mutations in these lines of the module")
    add(
        "--limit",
        type=float,
        help="seconds of computing for a mutation (default: three times what the tests take, and five)",
    )
    add("--minutes", type=float, help="stop a module after so long")
    add("--workers", type=int, default=1, help="modules at the same time (default: %(default)s)")
    add("--list", action="store_true", help="show the mutations and run nothing")
    add("--whole", action="store_true", help="run every test cell for every mutation")
    add("--all", action="store_true", help="run those that mutants.txt explains, too")
    add("--verbose", action="store_true", help="show what is killed, too")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", HF_HUB_OFFLINE="1")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    waiting, running, failed = list(options.modules), {}, False
    while waiting or running:  # a process for each module: what one imports is nothing to the next
        while waiting and len(running) < options.workers:
            name = waiting.pop(0)
            child = os.fork()
            if not child:
                total, killed, excused, survivors = run(name, options)
                if not options.list:
                    print(
                        f"{name}: {total} mutations, {killed} killed, {excused} explained, {len(survivors)}"
                        f" survived; {100 * (killed + excused) / max(1, total):.1f} %",
                        flush=True,
                    )
                sys.stdout.flush()
                os._exit(bool(survivors))
            running[child] = name
        done, status = os.wait()
        failed |= status != 0
        running.pop(done, None)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
