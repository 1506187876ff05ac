"""``python -m lcsc_opt`` is ``lcsc``."""

from lcsc_opt.cli import main

if __name__ == "__main__":
    main()
