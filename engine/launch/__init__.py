"""What `bash launch/train.sh` does once it has a Python: plan the run's processes, start them, look after them.

    environment.py   which variables other machines get
    machine.py       what this machine has
    plan.py          who starts how many processes where; hostfile.py, commands.py: its parts
    dry_run.py       all of that, shown instead of done
    attempt.py       a launcher and its ranks, from the first to the last; processes.py, meeting.py: its parts
    verdict.py       how the ranks ended, and with which exit code the run ends
    restarts.py      attempt after attempt

Nothing here imports torch: the processes that it starts do.
"""
