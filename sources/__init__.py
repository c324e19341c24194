"""Files of questions and trajectories: our formats, public benchmarks, released data, subtitles."""
