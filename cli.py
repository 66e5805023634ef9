"""Run finetune from a checkout: python cli.py train recipe.yaml."""

from finetune.cli import main

if __name__ == "__main__":
    main()
