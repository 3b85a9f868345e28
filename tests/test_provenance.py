"""tools/provenance.py: a figure says where it comes from, without loading anything heavy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from minillm.tools.provenance import provenance


def test_provenance_names_commit_machine_and_versions_in_json():
    found = json.loads(json.dumps(provenance()))
    assert found["commit"] is None or len(found["commit"]) == 40
    assert found["dirty"] in (None, True, False)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"] and found["cores"] >= 1
    assert found["versions"]["numpy"] == np.__version__


def test_provenance_imports_neither_torch_nor_transformers():
    code = (
        "import sys, minillm.tools.provenance as p; p.provenance();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'triton')))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
