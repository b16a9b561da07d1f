# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""What the server sees of one client is noise, and a server that lies gets nothing that it should not have."""

import numpy as np
import pytest
from scipy.stats import chi2, chisquare

from fedlpp_hf.privacy.secure_sums.client import RefusedError, SumClient
from fedlpp_hf.privacy.secure_sums.fixed_point import Contribution
from fedlpp_hf.privacy.secure_sums.members import Identity, Roster, derive_mask_key, derive_own_mask
from fedlpp_hf.privacy.secure_sums.messages import (
    MemberKeys,
    limit_members,
    read_members,
    read_message,
    read_share,
    read_words,
    write_message,
)
from fedlpp_hf.privacy.secure_sums.primitives import add_mask_, agree, combine_shares, digest, make_public_key
from fedlpp_hf.privacy.secure_sums.server import SumServer
from fedlpp_hf.wire.encoding import decode_message
from tests.privacy.secure_sums.parties import TASK, make_clients, make_terms, name_clients, reach, run, start


pytest.importorskip("Crypto", reason="needs the extra [privacy]")


def read_masked(terms, data):
    """The words of a masked update, as the server sees them."""
    return read_words(terms, data, {"client_id": str, "roster": str}, terms.size + 3)[1]


def run_with(value, size=50_000):
    """The masked words of the first of three clients, whose update is `value` everywhere."""
    terms = make_terms(size)
    heard = []
    clients = {
        name: SumClient(terms, name, Contribution(np.full(size, value, np.float32), 1.0, 1))
        for name in name_clients(3)
    }
    run(terms, clients, heard=heard)
    (data,) = [answer for step, client, answer in heard if (step, client) == ("shares", "site-00")]
    return read_masked(terms, data)


class TestMaskedUpdates:
    def test_bytes_are_uniform(self):
        """Chi-square over the 256 values of each of the four bytes: a masked constant, which in the clear has one value each."""
        words = run_with(0.25)
        for place in range(4):
            counts = np.bincount((words >> (8 * place)) & 255, minlength=256)
            assert chisquare(counts).pvalue > 1e-6, place
            # A bit that a sum of bytes would not see: neighbours are independent, too.
            pairs = np.bincount(
                ((words[:-1] >> (8 * place)) & 15) * 16 + ((words[1:] >> (8 * place)) & 15), minlength=256
            )
            assert chi2.sf(((pairs - pairs.mean()) ** 2 / pairs.mean()).sum(), 255) > 1e-6, place

    def test_two_updates_can_not_be_told_apart(self):
        """The largest and the smallest update: their masked words have the same mean, to within its error."""
        for one, other in ((run_with(1.0), run_with(-1.0)), (run_with(0.0), run_with(0.0))):
            assert not np.array_equal(one, other)
            difference = (one.astype(np.float64).mean() - other.astype(np.float64).mean()) / 2**32
            assert abs(difference) < 5 * np.sqrt(2 / 12 / len(one))
            assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 5 / np.sqrt(len(one))

    def test_every_round_has_other_masks(self):
        heard = []
        for _ in range(2):  # the same round with the same values
            clients, _ = make_clients(make_terms(100), 3)
            run(make_terms(100), clients, heard=heard)
        one, other = (
            read_masked(make_terms(100), data)
            for step, client, data in heard
            if (step, client) == ("shares", "site-00")
        )
        assert np.count_nonzero(one == other) < 3
        keys = [data for step, client, data in heard if step == "keys"]
        assert len(set(keys)) == 6

    def test_late_update_stays_masked(self):
        """Why there are two masks: the server has the key of a client that it took for gone, and then its update arrives."""
        server, clients, values, requests = reach("shares", 3)
        data = clients["site-00"].answer("shares", requests["site-00"])
        words = read_masked(server.terms, data).copy()
        client = clients["site-00"]
        roster: Roster = server.roster
        for other in name_clients(3)[1:]:
            private = derive_mask_key(server.terms, "site-00", client._key_seed)
            key = agree(private, roster.members[other].mask_key, roster.mask_context("site-00", other))
            add_mask_(words, key, -1)
        assert np.abs(words.view(np.int32)[:20] * server.terms.resolution(3) - values[0]).min() > 1e-4
        add_mask_(words, derive_own_mask(server.terms, "site-00", client._own_seed), -1)  # the test knows it
        assert np.abs(words.view(np.int32)[:20] * server.terms.resolution(3) - values[0]).max() < 1e-6


class TestLyingServer:
    """It wants both the share of a client's own mask and that of its key."""

    def test_one_request_can_not_ask_for_both(self):
        _, clients, _, requests = reach("opening")
        answer = clients["site-00"].answer("opening", requests["site-00"])
        with pytest.raises(RefusedError, match="answered another request for the opening"):
            clients["site-00"].answer("opening", requests["site-00"] + b" ")
        assert clients["site-00"].answer("opening", requests["site-00"]) == answer  # it was lost, and is sent again

    @pytest.mark.parametrize("when", ["confirmed", "opened"])
    def test_second_list_of_survivors_is_refused(self, when):
        server, clients, _, requests = reach("survivors")
        client = clients["site-00"]
        server.add_confirmation("site-00", client.answer("survivors", requests["site-00"]))
        if when == "opened":
            for name in name_clients(4)[1:]:
                server.add_confirmation(name, clients[name].answer("survivors", requests[name]))
            client.answer("opening", server.make_openings()["site-00"])
        lie = write_message(
            "survivors", server.terms, {"roster": server.roster.digest, "survivors": name_clients(4)[:3]}
        )
        with pytest.raises(RefusedError, match="answered another request for the survivors"):
            client.answer("survivors", lie)

    def test_opening_of_other_survivors_than_confirmed_is_refused(self):
        server, clients, _, _ = reach("opening")

        lie = digest(server.roster.survivors_context(name_clients(4)[:3]))
        request = write_message(
            "opening", server.terms, {"roster": server.roster.digest, "survivors": lie, "signatures": {}}
        )
        with pytest.raises(RefusedError, match="other survivors than this client confirmed"):
            clients["site-00"].answer("opening", request)

    @pytest.mark.parametrize(
        ("survivors", "message"),
        [
            (
                ["site-01", "site-02", "site-03"],
                "says that this client dropped out, but it has sent its masked update",
            ),
            (["site-00", "site-01"], "2 clients survived; at least 3 must have"),
            (["site-00", "site-01", "site-02", "stranger"], "survivors that did not share their keys"),
            (["site-00", "site-00", "site-01", "site-02"], "out of order, or one is there twice"),
        ],
    )
    def test_lists_that_can_not_be(self, survivors, message):
        server, clients, _, honest = reach("survivors")
        request = write_message("survivors", server.terms, {"roster": server.roster.digest, "survivors": survivors})
        with pytest.raises(RefusedError, match=message):
            clients["site-00"].answer("survivors", request)
        with pytest.raises(RefusedError, match="takes no further part"):  # nothing can be tried twice
            clients["site-00"].answer("survivors", honest["site-00"])

    def test_two_halves_told_two_lists_give_too_little(self):
        """Each half opens what it was told. With a threshold above one half no secret has enough shares for both lists."""
        server, clients, _, _ = reach("survivors", 6)
        names, shares = name_clients(6), {}
        for told, lists in ((names[:3], names), (names[3:], names[:0] + names[1:])):
            digest_of = server.roster.survivors_context(lists)

            for name in told:
                clients[name].answer(
                    "survivors",
                    write_message("survivors", server.terms, {"roster": server.roster.digest, "survivors": lists}),
                )
                fields = {"roster": server.roster.digest, "survivors": digest(digest_of), "signatures": {}}
                answer = clients[name].answer("opening", write_message("opening", server.terms, fields))
                shares[name] = answer
        # Of client 0: three shares of its own mask, three of its key; four are needed for either.
        assert server.roster.threshold == 4 and len(shares) == 6
        client = clients["site-00"]
        own = [(place, share) for place, share in enumerate(find_own_shares(shares, names[:3]), 1)]
        assert combine_shares(own) != client._own_seed
        keys = [(place, share) for place, share in enumerate(find_own_shares(shares, names[3:]), 4)]
        seed = combine_shares(keys)
        assert make_public_key(derive_mask_key(server.terms, "site-00", seed)) != client.keys.mask_key

    def test_different_rosters_leave_members_with_different_keys(self):
        """A server that shows one member other keys of another one (to sit between them) is found out by the first share."""
        server, clients, _, requests = start()
        for name in name_clients(4)[1:]:
            server.add_sealed(name, clients[name].answer("roster", requests[name]))
        terms = server.terms
        stranger, _ = make_clients(terms, 4, seed=1)
        members = {name: client.keys.to_json() for name, client in clients.items()}
        members["site-03"] = stranger["site-03"].keys.to_json()
        fields = {"threshold": 3, "bound": 1.0, "size": terms.size, "task": TASK, "members": members}
        answer = clients["site-00"].answer("roster", write_message("roster", terms, fields))
        with pytest.raises(ValueError, match="it answered to another roster"):
            server.add_sealed("site-00", answer)  # an honest server would see it, too
        sealed = server._sealed
        deliveries = {
            "roster": Roster(
                terms, {n: stranger[n].keys if n == "site-03" else clients[n].keys for n in clients}
            ).digest,
            "sealed": {name: sealed[name]["site-00"].hex() for name in name_clients(4)[1:]},
        }
        with pytest.raises(RefusedError, match="a share can't be decrypted"):
            clients["site-00"].answer("shares", write_message("deliveries", terms, deliveries))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"threshold": 2}, "the server's threshold is 2; by this client's options it is 3"),
            ({"bound": 2.0}, "the server's bound is 2.0; by this client's options it is 1.0"),
            ({"size": 19}, "the server's size is 19"),
            ({"bound": 1}, "`bound` can't be read"),
        ],
    )
    def test_own_options_decide(self, change, message):
        server, clients, _, _ = start()
        members = {name: client.keys.to_json() for name, client in clients.items()}
        fields = {"threshold": 3, "bound": 1.0, "size": 20, "task": TASK, "members": members} | change
        with pytest.raises(RefusedError, match=message):
            clients["site-00"].answer("roster", write_message("roster", server.terms, fields))

    @pytest.mark.parametrize("says_so", [True, False])
    def test_members_were_given_the_same_task(self, says_so):
        """A server gives all but one client a model that learns nothing. They would have masked with other keys than it."""
        terms, other = make_terms(20), make_terms(20, task="1" * 64)
        clients, _ = make_clients(terms, 4)
        target = make_clients(other, 4)[0]["site-00"]
        server = SumServer(terms)
        for name, client in (clients | {"site-00": target}).items():
            server.add_keys(name, client.advertise())
        request = server.make_rosters()["site-00"]
        if says_so:
            with pytest.raises(RefusedError, match="the server gave others another task than this client"):
                target.answer("roster", request)
            return
        members = {name: MemberKeys.from_json(keys) for name, keys in read_roster(request)["members"].items()}
        fields = read_roster(request) | {"task": other.task, "members": {n: k.to_json() for n, k in members.items()}}
        with pytest.raises(ValueError, match="it answered to another roster"):
            server.add_sealed("site-00", target.answer("roster", write_message("roster", terms, fields)))
        for name in name_clients(4)[1:]:
            server.add_sealed(name, clients[name].answer("roster", request))
        deliveries = {
            "roster": Roster(other, members).digest,
            "sealed": {name: sealed["site-00"].hex() for name, sealed in server._sealed.items()},
        }
        with pytest.raises(RefusedError, match="a share can't be decrypted"):
            target.answer("shares", write_message("deliveries", terms, deliveries))

    @pytest.mark.parametrize("kind", ["few", "without it", "doubled", "weak"])
    def test_rosters_that_can_not_be(self, kind):
        server, clients, _, _ = start()
        members = {name: client.keys.to_json() for name, client in clients.items()}
        if kind == "few":
            members = {name: members[name] for name in ("site-00", "site-01")}
        elif kind == "without it":
            members["site-00"] = make_clients(server.terms, 1)[0]["site-00"].keys.to_json()
        elif kind == "doubled":
            members["site-02"] = members["site-01"]
        else:
            members["site-02"] = ["00" * 32, *members["site-02"][1:]]
        message = {
            "few": "a sum of 2 clients; expected 3",
            "without it": "other keys of this client than it sent",
            "doubled": "two clients have a key in common",
            "weak": "none that keys can be agreed with",
        }[kind]
        fields = {
            "threshold": server.terms.threshold(len(members)),
            "bound": 1.0,
            "size": 20,
            "task": TASK,
            "members": members,
        }
        with pytest.raises(RefusedError, match=message):
            clients["site-00"].answer("roster", write_message("roster", server.terms, fields))

    def test_steps_come_in_order(self):
        _, clients, _, requests = start()
        with pytest.raises(RefusedError, match="asks for the opening before the roster"):
            clients["site-00"].answer("opening", requests["site-00"])
        with pytest.raises(RefusedError, match="no step 'everything'"):
            clients["site-00"].answer("everything", b"")

    def test_messages_of_another_round_are_refused(self):
        _, clients, _, _ = start()
        other = SumServer(make_terms(20, number=4))
        strangers, _ = make_clients(other.terms, 4)
        for name, client in strangers.items():
            other.add_keys(name, client.advertise())
        with pytest.raises(RefusedError, match="is of round 4; this round's is 3"):
            clients["site-00"].answer("roster", other.make_rosters()["site-00"])


def read_roster(request):
    """The fields of a roster, as they are in the message."""
    header, _ = decode_message("sum's roster", request)
    return {name: header[name] for name in ("threshold", "bound", "size", "task", "members")}


def find_own_shares(answers, holders):
    """The shares that are of the first client."""

    fields = {"client_id": str, "roster": str, "survivors": str, "shares": read_members(read_share)}
    return [
        read_message("shares", make_terms(20), answers[holder], fields, limit_members(6))["shares"]["site-00"]
        for holder in holders
    ]


class TestFalseShares:
    def test_wrong_share_is_found_out(self):
        """One member seals nonsense; the server can't open the sum, says whose secret it is, and opens nothing else."""
        server, clients, _, requests = reach("opening")
        held = clients["site-01"]._held
        held["site-00"] = bytes(16), bytes(16)
        for name, request in requests.items():
            server.add_shares(name, clients[name].answer("opening", request))
        with pytest.raises(ValueError, match="the shares of the own mask of client 'site-00' do not fit"):
            server.open()

    def test_wrong_mask_is_found_out(self):
        server, clients, _, requests = reach("shares", size=200)
        for name, request in requests.items():
            data = clients[name].answer("shares", request)
            if name == "site-02":
                words = read_masked(server.terms, data) + np.random.default_rng(0).integers(0, 2**32, 203, np.uint32)
                fields = {"client_id": name, "roster": server.roster.digest}
                data = write_message("masked update", server.terms, fields, words.astype(np.uint32))
            server.add_masked(name, data)
        for step, add, make in (
            ("survivors", server.add_confirmation, server.make_survivors),
            ("opening", server.add_shares, server.make_openings),
        ):
            for name, request in make().items():
                add(name, clients[name].answer(step, request))
        with pytest.raises(ValueError, match="out of range: a client masked its update with other keys"):
            server.open()


class TestIdentities:
    """Clients that know each other's keys from elsewhere than the server."""

    @pytest.fixture
    def identities(self):
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        keys = {name: Ed25519PrivateKey.generate() for name in name_clients(4)}

        def verify(client, signature, data):
            try:
                keys[client].public_key().verify(signature, data)
            except (InvalidSignature, KeyError):
                return False
            return True

        return {name: Identity(key.sign, verify) for name, key in keys.items()}

    def test_sum_is_opened(self, identities):
        clients, values = make_clients(make_terms(), 4, identities=identities)
        found, failures = run(make_terms(), clients, lost=[("shares", "site-01"), ("survivors", "site-02")])
        # Three of four survived, two of these confirmed, and three were needed.
        assert found is None and "2 of 4 clients sent their confirmation" in failures["site-00"]
        clients, values = make_clients(make_terms(), 4, identities=identities)
        found, _ = run(make_terms(), clients, lost=[("shares", "site-01")])
        assert np.abs(found.opened.mean - values[[0, 2, 3]].mean(axis=0)).max() < 1e-6

    def test_invented_client_is_refused(self, identities):
        """What a server without these keys could do: fill the roster with clients of its own."""
        terms = make_terms(20)
        clients, _ = make_clients(terms, 4, identities=identities)
        invented = SumClient(terms, "site-03", Contribution(np.zeros(20, np.float32), 1.0, 1))
        server = SumServer(terms)
        for name, client in (clients | {"site-03": invented}).items():
            server.add_keys(name, client.advertise())
        with pytest.raises(RefusedError, match="the keys of client 'site-03' are not signed by it"):
            clients["site-00"].answer("roster", server.make_rosters()["site-00"])

    def test_survivors_that_others_did_not_confirm_are_refused(self, identities):
        server, clients, _, requests = reach("survivors", identities=identities)
        for name, request in requests.items():
            server.add_confirmation(name, clients[name].answer("survivors", request))
        signatures = dict.fromkeys(name_clients(4), server._signatures["site-00"].hex())
        fields = {"roster": server.roster.digest, "survivors": server._survivors_digest, "signatures": signatures}
        with pytest.raises(RefusedError, match="client 'site-01' did not confirm these survivors"):
            clients["site-00"].answer("opening", write_message("opening", server.terms, fields))

    def test_too_few_confirmations_are_refused(self, identities):
        server, clients, _, requests = reach("survivors", identities=identities)
        clients["site-00"].answer("survivors", requests["site-00"])
        fields = {"roster": server.roster.digest, "survivors": server._survivors_digest, "signatures": {}}
        with pytest.raises(RefusedError, match="0 survivors confirmed the list; at least 3"):
            clients["site-00"].answer("opening", write_message("opening", server.terms, fields))
