"""The report as one HTML page: plain data from the report, and a page that renders it in the browser."""
