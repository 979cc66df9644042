"""The report of a job, for people and programs, written anew at the end of every stage.

record    report.json: what there is to know      collect   read from the work folder
page      index.html: one file, no script         charts    lines over steps, as inline SVG
serving   serve/: manifests for vLLM and KServe   machine   hardware and library versions
html      text that cannot break a page           write     all of it, from the stage runner
"""
