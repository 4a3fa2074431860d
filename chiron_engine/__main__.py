from __future__ import annotations

from chiron_engine.cli import main

if __name__ == "__main__":
    main()
