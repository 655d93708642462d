"""The benchmark harness: `python -m bench` measures, `python -m bench report` prints."""
