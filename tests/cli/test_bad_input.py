"""Bad command lines and bad files: each is exit code 2 and one sentence, before any work is done."""

import pytest

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

#: --set of a run -> what the sentence says.
ASSIGNMENTS = {
    "seed=2001-99-99": "seed = '2001-99-99' is not valid",
    "seed=2001-01-01": "seed = '2001-01-01' is not valid",
    "seed=!!int ''": "'' is no int",
    "seed=!!float ''": "'' is no float",
    "seed=!!bool maybe": "'maybe' is no bool",
    "seed=!!timestamp soon": "'soon' is no timestamp",
    "seed=!!python/object:os.system x": "could not determine a constructor",
    "seed=" + "9" * 5000: "is no int",
    "seed=0x" + "f" * 5000: "a number of too many digits is not valid: a number of at most",
    "seed=99999999999999999999": "a number of at most 9223372036854775807 was needed",
    "seed=-1": "seed = -1 is not valid",
    "seed=true": "seed = True is not valid: a number was needed",
    "seed=[1]": "seed = [1] is not valid",
    "seed={a: 1, a: 2}": "the key 'a' stands there twice",
    "seed=" + "[" * 400 + "]" * 400: "nested more than 50 deep",
    "seed=" + "{a: " * 400 + "}" * 400: "nested more than 50 deep",
    "seed=&a [*a]": "with its aliases it holds more than 20,000 values",
    "seed=[": "is not YAML",
    "seed=*nothing": "found undefined alias",
    'output="a\\0b"': "holds a character that no file can hold",
    'output="a\\ud800b"': "holds a character that no file can hold",
    "output=a\udcffb": "is not YAML",
    "output=[a]": "output = ['a'] is not valid",
    "output=1": "output = 1 is not valid",
    "steps=true": "steps = True is not valid: a number was needed",
    "steps=0": "steps = 0 is not valid",
    "steps=1.5": "steps = 1.5 is not valid",
    "steps=1000000000": "1 levels × 1,000,000,000 steps × 1 substeps are 1,000,000,000 cuts; at most 100,000",
    "substeps=1000000000": "at most 100,000",
    "sparsity=false": "sparsity = (False,) is not valid: a number was needed",
    "sparsity=[true]": "sparsity = [True] is not valid: a number was needed",
    "sparsity=[[0.5]]": "sparsity.0 = [0.5] is not valid",
    "sparsity={a: 0.5}": "sparsity = {'a': 0.5} is not valid",
    "sparsity=1e400": "sparsity.0 = inf is not valid",
    "device=cuda:99999999999999999999": "device = 'cuda:99999999999999999999' is not valid",
    "device=cuda:999": "device 'cuda:999' was asked for",
    "device=cuda:٣": "device = 'cuda:٣' is not valid",
    "device=3": "device = 3 is not valid",
    "task.name=" + "a" * 300: "no task 'aaa",
    "task=[digits]": "task = ['digits'] is not valid",
    "task.seed=true": "task.seed = True is not valid",
    "task.seed=99999999999999999999": "task.seed = 99999999999999999999 is not valid",
    "task.1=2": "there is no setting 'task.1'",
    "estimator.damping=true": "estimator.damping = True is not valid",
    "estimator.damping=" + "9" * 400: "is not valid",
    "estimator.examples=yes": "estimator.examples = True is not valid",
    "estimator.batch_size=1e30": "estimator.batch_size = 1e+30 is not valid",
    "estimator={1: 2}": "estimator",
    "estimator={null: 2}": "estimator",
    "compensation.scale=true": "compensation.scale = True is not valid",
    "reconstruction={how: fisher, examples: true}": "reconstruction.examples = True is not valid",
    "finetune.epochs=true": "finetune.epochs = True is not valid",
    "finetune=[1]": "finetune = [1] is not valid",
    "include=a": "include = 'a' is not valid",
    "include=[true]": "include.0 = True is not valid",
    "tracking.enabled=perhaps": "tracking.enabled = 'perhaps' is not valid",
    "tracking.uri='http://a b'": "an address without spaces was needed",
    "tracking.uri='http://'": "an address with a host was needed",
    "tracking.uri='http://a:port'": "it is no address",
    "tracking.uri='http://[::1'": "it is no address",
    "tracking.experiment=" + "a" * 300: "tracking.experiment = ",
    "preset=[a]": "preset = ['a'] is not a name",
    "nothing": "--set needs KEY=VALUE",
    "=1": "--set needs KEY=VALUE",
    "a..b=1": "--set needs KEY=VALUE",
    ".".join("a" * 2000) + "=1": "--set needs KEY=VALUE",
    "output\0=a": "holds a character that no file can hold",
}

#: A file of a run -> what the sentence says.
FILES = {
    BOMB: "with its aliases it holds more than 20,000 values (line 5, column",
    "a: &a {b: *a}\n": "with its aliases it holds more than 20,000 values",
    "x: &x {k1: 1, k2: 2}\n" + "y: {<<: [" + "*x, " * 40000 + "*x]}\n": "more than 20,000 values",
    "a: [" + "1," * 500_000 + "1]\n": "more than 20,000 values",
    "a: " + "1" * (1 << 20): "has more than 1,048,576 bytes",
    "seed: 1\nseed: 2\n": "the key 'seed' stands there twice (line 2, column 1)",
    "seed: 1\n'seed': 2\n": "the key 'seed' stands there twice",
    "task: {name: digits, name: mnist}\n": "the key 'name' stands there twice",
    "seed: 1\n---\nseed: 2\n": "expected a single document",
    "a\0b: 1\n": "special characters are not allowed",
    "{? [a, b] : 1}\n": "unhashable key",
    "seed: !!set {a}\n": "seed = {'a'} is not valid",
    "seed: !!binary '%'\n": "is not",
    "task: digits\nestimator: {damping: 1}\nsteps: yes\n": "steps = True is not valid",
    "\t- a": "cannot start any token",
    "%YAML 9.9\n---\nseed: 1\n": "incompatible YAML",
    "sparsity: [.nan]\n": "sparsity.0 = nan is not valid",
    "- 1\n": "must hold a mapping of settings",
    "just words\n": "must hold a mapping of settings",
}

METHODS = "methods: {magnitude: {estimator: identity}}\n"

#: A comparison's file -> what the sentence says.
COMPARISONS = {
    f"name: {'a' * 300}\n{METHODS}": "name = 'aaa",
    f"name: a/b\n{METHODS}": "name = 'a/b' is not valid",
    f"name: c\nname: d\n{METHODS}": "the key 'name' stands there twice",
    "name: c\n": "methods",
    "name: c\nmethods: []\n": "methods = [] is not valid",
    "name: c\nmethods: {1: {estimator: identity}}\n": "methods.1",
    "name: c\nmethods: {'': {estimator: identity}}\n": "1 to 100 printable characters",
    "name: c\nmethods: {%s: {estimator: identity}}\n" % ("a" * 300): "1 to 100 printable characters",
    'name: c\nmethods: {"a\\e[2J": {estimator: identity}}\n': "1 to 100 printable characters",
    'name: c\nmethods: {"a\\0": {estimator: identity}}\n': "holds a character that no file can hold",
    f"name: c\nseeds: [true, 1]\n{METHODS}": "seeds = [True, 1] is not valid: a number was needed",
    f"name: c\nseeds: [0, 0]\n{METHODS}": "names a seed twice",
    f"name: c\nseeds: []\n{METHODS}": "seeds = [] is not valid",
    f"name: c\naxes: {{steps: [true]}}\n{METHODS}": "steps = True is not valid",
    f"name: c\naxes: {{steps: {list(range(1, 3000))}, substeps: {list(range(1, 3000))}}}\n{METHODS}": "asks for up to",
    f"name: c\ntune: {{seed: 5000000000}}\n{METHODS}": "tune.seed = 5000000000 is not valid",
    f"name: c\ntune: {{trials: 1000000000}}\n{METHODS}": "tune.trials = 1000000000 is not valid",
    f"name: c\nrun: {{steps: 1000000000}}\n{METHODS}": "at most 100,000 can be made in one run",
    f"name: c\ntracking: {{uri: 'http://a b'}}\n{METHODS}": "an address without spaces was needed",
    BOMB: "with its aliases it holds more than 20,000 values",
}


def refused(result, sentence):
    code, out, err = result
    assert (code, out) == (2, ""), err[-2000:]
    assert err.startswith("sparsekit: ") and err.count("\n") == 1 and "Traceback" not in err
    assert sentence in err
    assert len(err) < 1500


def shortened(value):
    return repr(value)[:30]


@pytest.mark.parametrize(("assignment", "sentence"), ASSIGNMENTS.items(), ids=shortened)
def test_a_bad_assignment_is_one_sentence(cli, tmp_path, assignment, sentence):
    refused(cli("run", "--dry-run", "--set", assignment), sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "sentence"), FILES.items(), ids=shortened)
def test_a_bad_file_of_a_run_is_one_sentence(cli, tmp_path, text, sentence):
    (tmp_path / "run.yaml").write_text(text)
    refused(cli("run", "--dry-run", "--config", str(tmp_path / "run.yaml")), sentence)


@pytest.mark.parametrize(("text", "sentence"), COMPARISONS.items(), ids=shortened)
def test_a_bad_file_of_a_comparison_is_one_sentence(cli, tmp_path, text, sentence):
    (tmp_path / "c.yaml").write_text(text)
    refused(cli("compare", str(tmp_path / "c.yaml"), "--dry-run"), sentence)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["run", "--steps", "1000000000", "--dry-run"], "at most 100,000 can be made in one run"),
        (["run", "--steps", "9" * 30, "--dry-run"], "a number of at most"),
        (["run", "--tracking-uri", "http://a b"], "an address without spaces was needed"),
        (["run", "--device", "cuda:99999999999999999999"], "device = 'cuda:99999999999999999999' is not valid"),
        (["run", "--task", "[/b]"], "no task '[/b]'"),
        (["run", "--estimator", "x" * 300], "no estimator 'xxx"),
        (["run", "--data-dir", "a\udcff", "--task", "mnist"], "holds a character that no file can hold"),
        (["run", "--checkpoint", "a\0b"], "holds a character that no file can hold"),
        (["run", "--config", "/dev/zero"], "has more than 1,048,576 bytes"),
        (["run", "--config", "."], "cannot be read: Is a directory"),
        (["run", "--config", "x" * 300], "cannot be read: File name too long"),
        (["compare", "x" * 300], "cannot be read: File name too long"),
        (["compare", "."], "cannot be read: Is a directory"),
    ],
    ids=shortened,
)
def test_a_bad_command_line_is_one_sentence(cli, args, sentence):
    refused(cli(*args), sentence)


def test_an_alias_that_is_used_twice_is_no_bomb(cli, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "estimator: &e {name: obs, examples: 64}\nsaliency: &s obs\npattern: unstructured\n"
    )
    assert cli("run", "--dry-run", "--json", "--config", str(tmp_path / "run.yaml"))[0] == 0


def test_aliases_that_nest_deeper_than_what_is_written_are_refused(cli, tmp_path):
    lines = [f"a0: &a0 {'[' * 40}1{']' * 40}"]
    lines += [f"a{i}: &a{i} {'[' * 40}*a{i - 1}{']' * 40}" for i in range(1, 20)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    refused(
        cli("run", "--dry-run", "--config", str(tmp_path / "run.yaml")),
        "with its aliases it is nested more than 50 deep",
    )
