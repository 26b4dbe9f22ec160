"""The paper's comparison of whole systems: Table 1, Table 6 (throughput), Table 7 (architectures) and Fig. 1.

Nothing here trains. What is measured is kept as CSV, one row a measurement; tables are made from it and from counts.
"""

from .accuracy_plot import figure_1
from .accuracy_table import table_1
from .architecture_table import table_7
from .throughput_table import table_6
from .write import write_all

__all__ = ["figure_1", "table_1", "table_6", "table_7", "write_all"]
