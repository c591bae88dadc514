# Short names for the commands of run.py. Without make, run these commands directly.
PYTHON ?= python3

.PHONY: setup run test test-slow quality style docs compat lock

setup:
	$(PYTHON) run.py setup

run:
	$(PYTHON) run.py generate "Once upon a time" --decoding arpc --block-size 16

test:
	$(PYTHON) run.py test

test-slow:
	$(PYTHON) run.py test -m slow

quality:
	$(PYTHON) run.py quality

style:
	$(PYTHON) run.py style

docs:
	$(PYTHON) run.py docs

compat:
	$(PYTHON) run.py compat

lock:
	$(PYTHON) run.py lock
