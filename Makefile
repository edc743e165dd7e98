# Every target sets itself up in .venv inside the checkout; Python 3.11 or newer is all that is needed.
