"""tools/provenance.py: a figure says where it comes from, without loading anything heavy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

CODE = """
import json, sys
from minillm.tools.provenance import provenance
print(json.dumps(provenance() | {"loaded": sorted({"torch", "transformers", "triton"} & set(sys.modules))}))
"""


def test_provenance_names_commit_machine_and_versions_and_loads_neither_torch_nor_transformers():
    command = [sys.executable, "-c", CODE]
    found = json.loads(subprocess.check_output(command, cwd=Path(__file__).parents[1]))
    assert found["loaded"] == []
    assert found["commit"] is None or len(found["commit"]) == 40
    assert found["dirty"] in (None, True, False)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"] and found["cores"] >= 1
    assert found["versions"]["numpy"] == np.__version__
