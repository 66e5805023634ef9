"""python -m finetune: the same as the command."""

from finetune.cli import main

if __name__ == "__main__":
    main()
