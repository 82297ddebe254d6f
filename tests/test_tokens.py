"""Access tokens stay out of what is printed and written."""
import pytest

from mixsize_timm import train
from mixsize_timm.errors import run_command
from mixsize_timm.tokens import holds_token, mask

TOKEN = 'hf_' + 'aB3' * 11


@pytest.mark.parametrize('text', [
    TOKEN, f'https://hub/x?token={TOKEN}&a=1', f"'Bearer {TOKEN}'", 'hf_oauth_' + 'x1' * 15])
def test_a_token_of_the_hub_is_masked(text):
    assert holds_token(text) and TOKEN not in mask(text) and '***' in mask(text)


@pytest.mark.parametrize('text', [
    '', 'hf-hub:timm/resnet50', 'hf_hub:timm/resnet50.a1_in1k', 'hfds/cifar10', 'hf_hub_download', 'a_hf_x'])
def test_names_are_no_tokens(text):
    assert not holds_token(text) and mask(text) == text


def test_whatever_the_environment_holds_is_masked(monkeypatch):
    monkeypatch.setenv('WANDB_API_KEY', 'local-0123456789')
    monkeypatch.setenv('HF_TOKEN', 'x')  # a placeholder, which is in many words
    assert mask('key local-0123456789 of xenon') == 'key *** of xenon'


def test_training_refuses_a_token_before_it_is_written(tmp_path, capsys):
    code = train.main(['--data-dir', f'https://hub/data?token={TOKEN}', '--output', str(tmp_path / 'out')])
    error = capsys.readouterr().err
    assert code == 2 and '--data-dir holds an access token' in error and 'HF_TOKEN' in error
    assert TOKEN not in error and not (tmp_path / 'out').exists()


def test_no_error_prints_a_token(capsys):
    def fail():
        from mixsize_timm.errors import UsageError
        raise UsageError(f'cannot open https://hub/{TOKEN}')

    assert run_command('mixsize x', fail, str) == 2
    assert capsys.readouterr().err == 'mixsize x: error: cannot open https://hub/***\n'
