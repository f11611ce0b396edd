"""CNN/DailyMail (Hermann et al., 2015; texts of See et al., 2017). A summary has one sentence per line, as ROUGE-Lsum
expects.
"""

from sparse_llm_ft.data.tasks.task import Task

TASK = Task(
    name="cnn_dailymail",
    hub_id="abisee/cnn_dailymail",
    hub_config="3.0.0",
    prompt="Summarize the article.\n\n{article}\n\nSummary:",
    completion=" {highlights}",
    metrics=("rouge",),
    description="summaries of news articles in a few sentences",
    source="CNN/DailyMail, Hermann et al., 2015; See et al., 2017",
    example={
        "article": "A baker in the old town sold bread by weight again. Customers queued before six.",
        "highlights": "Baker sells bread by weight .\nCustomers queue before six .",
        "id": "1",
    },
)
