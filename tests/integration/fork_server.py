"""A process that imports everything once and then forks: dozens of runs to kill, in seconds.

The server is a Python of its own, started with one thread, so that forking it is safe whatever
the tests' process has loaded. It reads a task a line and answers each with a number: a child's
process id, or its exit code (minus the signal that killed it).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
LIMIT_S = 60  # a child that hangs dies, and its test fails, before anyone loses patience


class ForkServer:
    """The tests' side; use as a context manager.

    Args:
        module: with the functions that children run; the server imports it before it forks.
        output: file that takes all that server and children print.
    """

    def __init__(self, module: str, output: Path):
        self._module = module
        self.output = output

    def __enter__(self) -> ForkServer:
        with open(self.output, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def call(self, function: str, **arguments: Any) -> None:
        """Run a function in the server itself, so that every child has what it loads."""
        self._ask({"task": "call", "function": function, "arguments": arguments})

    def start(self, function: str, **arguments: Any) -> int:
        """Fork a child that runs a function; return its process id, kept until `wait`."""
        return self._ask({"task": "fork", "function": function, "arguments": arguments})

    def wait(self) -> int:
        """Wait for the child; return its exit code, or minus the signal that killed it."""
        return self._ask({"task": "wait"})

    def run(self, function: str, **arguments: Any) -> int:
        """Start and wait."""
        self.start(function, **arguments)
        return self.wait()

    def _ask(self, task: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the server ended: {self.output.read_text()}"
        return int(answer)


def serve(module_name: str) -> None:
    """The server's side."""
    # Answers go where standard output went; what anyone prints goes with standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(module_name)
    child = 0
    for line in sys.stdin:
        task = json.loads(line)
        answer = 0
        if task["task"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        elif task["task"] == "call":
            getattr(module, task["function"])(**task["arguments"])
        else:
            answer = child = os.fork()
            if child == 0:
                run_child(getattr(module, task["function"]), task["arguments"])
        print(answer, file=answers, flush=True)


def run_child(function: Any, arguments: dict[str, Any]) -> NoReturn:
    """Run a function and end the process with its exit code; 70 for an error of ours or others."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(LIMIT_S)
    code = 70
    try:
        function(**arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
