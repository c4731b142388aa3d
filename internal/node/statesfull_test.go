package node

import (
	"testing"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/host/hosttest"
)

// TestStatesOnFullDisk: what could not be recorded for want of space is recorded
// once there is room, the node does not turn read-only, and a power cut at the
// end finds all that was answered.
func TestStatesOnFullDisk(t *testing.T) {
	d := memDisk(t, 1)
	n := openNode(t, d)
	id := testSeg(1)
	must(t, n.Create(bg(), id, 1, 256))
	full := d.Inject(host.Rule{Ops: host.OpWrite | host.OpSync | host.OpCreate, Err: atoll.ErrNoSpace})
	for epoch := atoll.Epoch(2); epoch < 20; epoch++ { // more than a node takes of other errors
		_, err := n.Fence(bg(), id, epoch)
		wantErr(t, err, atoll.ErrNoSpace)
	}
	full.Remove()
	_, err := n.Fence(bg(), id, 30)
	must(t, err)
	must(t, n.Create(bg(), testSeg(2), 1, 256))
	n.Abort()
	n = openNode(t, d.Crash(nil, hosttest.LoseUnsynced))
	_, err = n.Fence(bg(), id, 29)
	wantErr(t, err, atoll.ErrFenced)
	if _, err := n.lookup(testSeg(2)); err != nil {
		t.Error(err)
	}
}
