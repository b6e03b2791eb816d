"""The CrypTen backend: arithmetic and binary shares between two parties, and a dealer.

CrypTen 0.4.1 is imported and mended by :func:`.compat.load` only; ``communicator``, ``provider``
and ``layers`` import it and so are imported after that call, by ``party``.
"""
