"""What a kernel is told in a call: integers and addresses, each at its place in one array."""

from haq.int8.llvm.words import I64, POINTER, Code, Type, Value, number

CALL = (
    "tokens",  # float [T, K]
    "count",  # T
    "width",  # K
    "integers",  # room for the tokens' integers [T, stride]
    "stride",
    "blocks",  # room for them once more, for processors that multiply matrices
    "strips",  # room for some rows of a weight and for sums, for each thread of these
    "of_thread",  # how many bytes of it each thread has
    "scales",  # float32 [T], written to
    "shifts",  # float32 [T], written to
    "out",  # float [T, N]
    "rows",  # N
    "chunk",  # rows of a weight that a thread takes at a time
    "block",  # tokens that are multiplied with them while both are in the cache
    "few",  # as many tokens of a weight wait for its rows, which are then read one by one
    "counter",  # how many such pieces have been taken: 0
    "groups",  # how many weights there are; `GROUP` of each follows
)
"""The first places of a call. T tokens, K in-features, N out-features."""

GROUP = (
    "weight",  # int8 [N, K]
    "scale",  # float32 [N]
    "sums",  # int32 [N], of the weight's rows
    "bias",  # float32 [N], or 0
    "row_sums",  # float32 [N], for tokens with a zero point, or 0
    "first",  # tokens that it is multiplied with: from here
    "last",  # to before here
)
"""The places of one weight."""

_ADDRESSES = {"tokens", "integers", "blocks", "strips", "scales", "shifts", "out"}
_ADDRESSES |= {"weight", "scale", "sums", "bias", "row_sums"}
_ADDRESSES |= {"query", "key", "value", "mask", "scores", "room"}  # of attention
_ADDRESSES |= {"a", "b", "cos", "sin", "turned_query", "turned_key", "placed_value"}
_ADDRESSES |= {"chosen"}  # of a router
_ADDRESSES |= {"factors", "shares", "owed", "differences"}  # of rounding a weight
_ADDRESSES |= {"floats", "beyond", "left", "right"}  # of sums of outer products


class Told:
    """Reads what a kernel is told, all of it where this is made: before the loops.

    Args:
        code: of the kernel.
        base: where the places begin.
        places: their names.
    """

    def __init__(self, code: Code, base: Value, places: tuple[str, ...]) -> None:
        self._code, self._base, self._places = code, base, places
        self._values = {n: code.load(self.place(n), typ=self._kind(n)) for n in places}

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def place(self, name: str) -> Value:
        """Its address."""
        return self._code.address(self._base, number(self._places.index(name)), I64)

    def _kind(self, name: str) -> Type:
        return POINTER if name in _ADDRESSES else I64
