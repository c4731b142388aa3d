package controller

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
)

// fakeMedia seals what it is asked to settle.
type fakeMedia struct {
	cat     *catalog.Catalog
	session *catalog.Session
	mu      sync.Mutex
	asked   []atoll.MediumID
}

func (f *fakeMedia) Settle(ctx context.Context, id atoll.MediumID) error {
	f.mu.Lock()
	f.asked = append(f.asked, id)
	f.mu.Unlock()
	h, err := f.cat.AcquireIdle(ctx, id, f.session)
	if err != nil {
		return err
	}
	for _, u := range h.Unsealed {
		h.Sealed = append(h.Sealed, catalog.Sealed{Seg: u.Seg, Length: 1})
	}
	h.Unsealed, h.Process = nil, atoll.UUID{}
	_, err = f.cat.SwapHead(ctx, h)
	return err
}

// A move is settled only when no head lists an unsealed segment of its copyset:
// until then the old members are asked when the segment is recovered. Media
// without an owner are settled; media with one settle by themselves.
func TestMoveWaitsForUnsealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		cat, ctx := r.cat[1], r.ctx
		media := &fakeMedia{cat: cat, session: r.ses[1]}
		for i := range r.ctl { // with somebody who settles
			r.ctl[i].Close()
			r.ctl[i] = Open(Options{Catalog: r.cat[i], Session: r.ses[i], Nodes: r.nodes, Media: media})
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		_, err := r.cat[0].RegisterNode(ctx, r.ses[0], catalog.Node{
			Disk: atoll.UUID{9}, Incarnation: atoll.UUID{1}, Host: "a", Report: catalog.NodeReport{Total: 10, Free: 5, At: time.Now()}})
		must(err)
		time.Sleep(2 * time.Second)
		set, err := cat.EnsureCopyset(ctx, []atoll.NodeID{1, 2, 3})
		must(err)
		m, err := cat.CreateMedium(ctx, catalog.Medium{Name: "m", Kind: catalog.KindVolume, Size: 4096})
		must(err)
		h, err := cat.Acquire(ctx, m.ID, r.ses[1])
		must(err)
		h.Unsealed = []catalog.Unsealed{{Seg: atoll.SegmentID{Medium: m.ID, Ordinal: h.Next, Copyset: set.ID}, Size: 9}}
		h.Next++
		h, err = cat.SwapHead(ctx, h, set.ID)
		must(err)

		set, err = cat.StartMove(ctx, set, catalog.Move{Old: 3, New: 4, Why: catalog.MoveBalance})
		must(err)
		later := h
		later.Unsealed = append(slices.Clone(h.Unsealed), catalog.Unsealed{Seg: atoll.SegmentID{Medium: m.ID, Ordinal: h.Next, Copyset: set.ID}, Size: 9})
		if _, err := cat.SwapHead(ctx, later, set.ID); !errors.Is(err, atoll.ErrBusy) {
			t.Errorf("a segment was registered on a copyset in a move: %v", err)
		}
		if _, err := cat.FinishMove(ctx, set, 4); !errors.Is(err, atoll.ErrInvalid) {
			t.Errorf("a move was finished before it was settled: %v", err)
		}
		other, err := cat.EnsureCopyset(ctx, []atoll.NodeID{1, 2, 3})
		if err != nil || other.ID == set.ID || other.Retired {
			t.Errorf("the members in another copyset: %+v, %v", other, err)
		}
		time.Sleep(20 * time.Second)
		if now := cat.State().Copysets[set.ID]; len(now.Moves) != 1 || now.Moves[0].Settled || !now.Retired {
			t.Fatalf("settled while the owner has it open: %+v", now)
		}
		if len(media.asked) != 0 {
			t.Errorf("media with an owner were settled: %v", media.asked)
		}
		h.Process = atoll.UUID{}
		_, err = cat.SwapHead(ctx, h)
		must(err)
		time.Sleep(10 * time.Second)
		now := cat.State().Copysets[set.ID]
		if len(now.Moves) != 1 || !now.Moves[0].Settled {
			t.Fatalf("not settled when nothing is unsealed: %+v", now)
		}
		if len(media.asked) == 0 {
			t.Error("nobody settled the medium")
		}
		stale := now
		stale.Rev = set.Rev
		if _, err := cat.FinishMove(ctx, stale, 4); !errors.Is(err, atoll.ErrConflict) {
			t.Errorf("finished from what was read earlier: %v", err)
		}
		now, err = cat.FinishMove(ctx, now, 4)
		must(err)
		if !slices.Equal(now.Nodes, []atoll.NodeID{1, 2, 4}) || now.Version != 2 || len(now.Moves) != 0 {
			t.Errorf("finished: %+v", now)
		}
		again, err := cat.EnsureCopyset(ctx, []atoll.NodeID{4, 2, 1})
		if err != nil || again.Retired || now.Retired == (again.ID == now.ID) {
			t.Errorf("set of the new members: %+v beside %+v, %v", again, now, err)
		}
	})
}

// A node that is down is noted so, with the time, and lost when the grace is
// over, also by the next controller.
func TestDownIsNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.close()
		time.Sleep(2 * time.Second)
		if err := r.cat[0].WithdrawNode(r.ctx, r.ses[0], 2); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		since := r.cat[1].State().Nodes[2].Down
		if since.IsZero() {
			t.Fatal("not noted")
		}
		r.ctl[0].Close()
		time.Sleep(5 * time.Second)
		if now := r.cat[1].State().Nodes[2].Down; !now.Equal(since) {
			t.Errorf("the next controller noted %v instead of %v", now, since)
		}
		if _, err := r.cat[0].RegisterNode(r.ctx, r.ses[0], catalog.Node{Disk: atoll.UUID{2}, Incarnation: atoll.UUID{1}, Host: "a"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if now := r.cat[1].State().Nodes[2].Down; !now.IsZero() {
			t.Errorf("still noted: %v", now)
		}
	})
}
