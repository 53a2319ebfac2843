"""Exit 0 when the msgpack on standard input equals the JSON file given, 1 when not, 77 without msgpack."""

import json
import sys

try:
    import msgpack
except ImportError:
    sys.exit(77)

with open(sys.argv[1], encoding="utf-8") as file:
    expected = json.load(file)
got = msgpack.unpackb(sys.stdin.buffer.read(), raw=False)
sys.exit(0 if got == expected else 1)
