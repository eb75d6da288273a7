"""Where neural networks keep what they memorize: training, localization, and the chapters that use them.

Importing the package imports nothing heavy; take the module you need, e.g. ``from memloc import training``.
"""

__version__ = "0.1.0"
