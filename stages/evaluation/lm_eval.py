"""EleutherAI's lm-eval, to which students are plain `hf` models.

    python -m teacher_cache.stages.evaluation.lm_eval \
        --model hf --model_args pretrained=RUN --tasks wikitext

All arguments are lm-eval's own. It loads what transformers' Auto classes know, and they know the
students once this package is imported; that is all that is done here. In a program, `import
teacher_cache.stages.student` before `lm_eval.simple_evaluate` does the same.
"""

from __future__ import annotations

import sys

import teacher_cache.stages.student  # noqa: F401  (registers the student with the AutoClasses)


def main() -> None:
    """Run lm-eval's command line."""
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        print(
            f"error: lm-eval cannot be imported ({error}): install it with `pip install -c "
            'constraints.txt -e ".[eval]"`',
            file=sys.stderr,
        )
        sys.exit(2)
    cli_evaluate()


if __name__ == "__main__":
    main()
