"""``python -m exporter`` is the same as ``medexport``."""

from exporter.cli.main import main

if __name__ == "__main__":
    main()
