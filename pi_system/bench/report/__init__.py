"""``pi-bench report``: result files as one page that needs nothing beside it.

``sources`` reads and checks the files, ``sections`` turns them into tables and what to plot,
``charts`` draws, ``page`` writes HTML, PNG and CSV.
"""
