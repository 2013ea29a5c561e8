"""The tabs of the page, one module each: layout, then what it shows, then handlers, then wiring."""
