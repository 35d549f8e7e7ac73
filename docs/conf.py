"""Sphinx settings of the site; tools/docs.py writes the pages around them."""
project = html_title = "brainldm"
author = "brainldm authors"
extensions = ["myst_nb"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["brainldm.css"]
html_favicon = "_static/brain.svg"
html_copy_source = html_show_sourcelink = html_show_sphinx = False
toc_object_entries_show_parents = "hide"
add_module_names = False
nb_execution_mode = "off"                    # outputs come from the stored notebooks
nb_ipywidgets_js = {}                        # the default asks a CDN for widgets; a static page has no kernel anyway
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
mathjax_path = "mathjax/tex-svg.js"          # mathjax 3.2.2, es5/tex-svg.js from npm: one file, so that maths needs no network
mathjax3_config = {"options": {"enableMenu": False}}
