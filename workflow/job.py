"""One job of the workflow; the Snakefile calls it."""

from cadm_paper.app.batch import job

if __name__ == "__main__":
    job()
