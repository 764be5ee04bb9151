import numpy as np

from quietstar_jax.data import cache


def test_two_hosts_with_the_same_process_number_write_one_array(tmp_path, monkeypatch):
    path, save = tmp_path / "index.npy", np.save

    def save_while_another_host_does(stream, array):
        save(stream, array[:2])
        stream.flush()
        monkeypatch.setattr(np, "save", save)
        cache.write_array(path, array)
        stream.seek(0)
        save(stream, array)

    monkeypatch.setattr(np, "save", save_while_another_host_does)
    cache.write_array(path, np.arange(5))
    np.testing.assert_array_equal(np.load(path), np.arange(5))
    assert [file.name for file in tmp_path.iterdir()] == ["index.npy"]
