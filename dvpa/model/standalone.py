"""The model's own source beside its weights, for processes in which dvpa is not installed.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then runs these files (named
by `AUTO_MAP` in config.json). They are written from the installed package, see `bundler.py`; where
dvpa is installed and imported, its own classes are used and the files are ignored.
"""

from importlib import import_module
from pathlib import Path

CONFIGURATION_FILE = "configuration_dvpa.py"
MODELING_FILE = "modeling_dvpa.py"
AUTO_MAP = {
    "AutoConfig": "configuration_dvpa.DvpaConfig",
    "AutoModel": "modeling_dvpa.DvpaModel",
    "AutoModelForCausalLM": "modeling_dvpa.DvpaForCausalLM",
}


def write_standalone(folder: Path) -> None:
    """Write both files into `folder`."""
    here = Path(__file__)
    if here.name == MODELING_FILE:  # running from such a file: hand on what is here
        names = (CONFIGURATION_FILE, MODELING_FILE)
        sources = {name: (here.parent / name).read_text(encoding="utf-8") for name in names}
    else:
        sources = import_module("dvpa.model.bundler").bundle()
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
