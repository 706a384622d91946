"""What the fork server has done before it forks: each process would else read the sources of the code again."""

from depthmup.train.owner import code_fingerprint

code_fingerprint()
