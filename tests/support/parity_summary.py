"""A parity summary, for tests of the code that writes and displays one."""

from cifarx_serve.spec import ParitySummary

SUMMARY = ParitySummary(
    passed=True,
    images=1003,
    batch_sizes=(1, 3, 64),
    max_abs_error=2e-6,
    mean_abs_error=1e-6,
    p999_abs_error=1.5e-6,
    required_tolerance=3e-7,
    atol=1e-4,
    rtol=2e-4,
    agreement=0.75,
    forgiven=4,
    reference_accuracy=0.5,
    accuracy=0.25,
    nonfinite=6,
    provider="CPUExecutionProvider",
    data="pictures",
    data_fingerprint="0" * 64,
    agreement_bound=0.7,
)
