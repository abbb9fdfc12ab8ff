"""The page of a run, RUN/report.html, made from the files of its folder alone, and the page that
compares several.
"""
