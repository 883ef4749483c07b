"""A run as a page: its curves from event files, its layers, the doctor's verdict.

run_page        the page, `report.html`
live_report     made at each checkpoint, and at the end
event_curves    the curves of any run, from its event files
"""
