# SPDX-License-Identifier: Apache-2.0
"""`python -m avar_verl ...`: the console script `avar`."""

from avar_verl.tools.cli import main

if __name__ == "__main__":
    main()
