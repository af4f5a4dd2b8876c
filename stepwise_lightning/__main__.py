"""``python -m stepwise_lightning`` is the same as ``stepwise``."""

from stepwise_lightning.commands import main

if __name__ == "__main__":
    main()
