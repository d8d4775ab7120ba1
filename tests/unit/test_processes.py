"""Processes of a command that was interrupted while they started."""

import subprocess
import sys


def test_a_process_whose_folder_is_gone_leaves_without_a_word(tmp_path):
    code = (
        "from bigtrain.processes import _work\n"
        f"_work(print, 0, 1, {str(tmp_path / 'gone')!r}, None, ('it went on',), False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
