"""The flows that deployments name in `prefect.yaml`; a deployment that was made once goes on."""

from pipeline.flow.deployed import gpt_pipeline_on_agent, watch_sources

__all__ = ["gpt_pipeline_on_agent", "watch_sources"]
