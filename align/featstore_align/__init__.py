"""Frame rates and their conversion: features at one rate re-expressed at another. Arrays in, arrays out.

`retrans` for continuous features, `align_f0` for f0, `nearest` for labels; `source_range` and `taps` say which source
frames they use. `conversion` prepares a pair of grids once, for the many crops that `align` then reads one by one, and
`align_batch` all together.
"""

from .batch import align_batch
from .conversion import Conversion, conversion, exact
from .f0 import align_f0
from .retrans import align, nearest, retrans, source_range, taps

__all__ = ["Conversion", "align", "align_batch", "align_f0", "conversion", "exact", "nearest", "retrans",
           "source_range", "taps"]
