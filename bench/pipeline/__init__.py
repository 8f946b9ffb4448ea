"""What tracking, saving and orchestration cost."""
