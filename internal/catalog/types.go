package catalog

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
)

// Cluster is the cluster's own record.
type Cluster struct {
	ID      atoll.UUID `json:"id"`
	Name    string     `json:"name,omitempty"`
	Level   int        `json:"level"` // format level; only rises
	Created time.Time  `json:"created"`
}

// NodeState is what the operator wants of a node.
type NodeState string

// States of a node. Whether it answers is not a state but Node.Up.
const (
	NodeActive   NodeState = "active"
	NodeDraining NodeState = "draining" // takes no new segments
	NodeRemoved  NodeState = "removed"
)

// Node is a storage node: one disk. The failure domains are disk < node < host
// < rack.
type Node struct {
	ID          atoll.NodeID `json:"id"`
	Disk        atoll.UUID   `json:"disk"`        // identity in the superblock
	Incarnation atoll.UUID   `json:"incarnation"` // of the disk's contents
	Process     atoll.UUID   `json:"process"`     // server process it last ran in
	Addr        string       `json:"addr"`        // wire address
	Host        string       `json:"host"`
	Rack        string       `json:"rack,omitempty"`
	State       NodeState    `json:"state"`
	Created     time.Time    `json:"created"`
	Down        time.Time    `json:"down,omitzero"`  // since when the controller knows it as down
	Heir        atoll.NodeID `json:"heir,omitempty"` // of a draining node: the one to take its place

	// From the node's report, which lives as long as its process's lease.
	Up     bool       `json:"up"`
	Report NodeReport `json:"report"`

	Rev int64 `json:"-"`
}

// NodeReport is what a node says of itself every second.
type NodeReport struct {
	Total    int64         `json:"total"` // bytes
	Free     int64         `json:"free"`
	Segments int           `json:"segments"`
	Open     int           `json:"open"`
	ReadOnly bool          `json:"readOnly,omitempty"`
	Full     bool          `json:"full,omitempty"`
	Silent   bool          `json:"silent,omitempty"` // it does not answer its own process; the numbers are the last it gave
	Errors   uint64        `json:"errors,omitempty"`
	P99      time.Duration `json:"p99,omitempty"` // of recent appends
	At       time.Time     `json:"at"`
	Sets     []SetBytes    `json:"sets,omitempty"`    // the copysets of which it holds most
	Stray    int64         `json:"stray,omitempty"`   // bytes of copies that are to go: their copysets do not have the node any more
	Healing  *Healing      `json:"healing,omitempty"` // while it takes the place of members of copysets
}

// SetBytes is how much a node holds of a copyset.
type SetBytes struct {
	ID    atoll.CopysetID `json:"id"`
	Bytes int64           `json:"bytes"`
}

// Healing is how far a node is with the copies it makes as the new member of
// copysets.
type Healing struct {
	Sets    int    `json:"sets"`              // copysets it is to join
	Copies  int    `json:"copies"`            // segments still to be copied, as far as listed
	Bytes   int64  `json:"bytes"`             // of these
	Done    int64  `json:"done"`              // bytes copied since its process began with these sets
	Rate    int64  `json:"rate,omitempty"`    // bytes a second, lately
	Waiting int    `json:"waiting,omitempty"` // segments whose owner has to settle them first
	Err     string `json:"err,omitempty"`     // why it does not get on
}

// Copyset is a set of nodes in different failure domains that hold the copies
// of segments, or the shards of coded ones: which of these a node has depends on
// its place in Nodes, so a new member takes the place of the old one. Version
// rises with every change of membership. While a member is being replaced the set
// is retired.
type Copyset struct {
	ID      atoll.CopysetID `json:"id"`
	Nodes   []atoll.NodeID  `json:"nodes"`
	Version uint64          `json:"version"`
	Retired bool            `json:"retired,omitempty"` // takes no new segments
	Moves   []Move          `json:"moves,omitempty"`   // members on their way in
	Rev     int64           `json:"-"`
}

// Move puts a new member in the place of an old one, or adds it to a set that
// has too few (Old is 0). New is no member before the move is finished: it is
// not read, and what it holds or lacks is evidence of nothing.
type Move struct {
	Old   atoll.NodeID `json:"old,omitempty"`
	New   atoll.NodeID `json:"new"`
	Why   MoveReason   `json:"why"`
	Since time.Time    `json:"since"`
	// Settled: no head lists an unsealed segment of the set, nor can one be
	// registered while the move stands.
	Settled bool `json:"settled,omitempty"`
}

// MoveReason tells why a member is replaced.
type MoveReason string

// Reasons of moves.
const (
	MoveLost    MoveReason = "lost"    // it is down for too long, or removed
	MoveErrors  MoveReason = "errors"  // its disk reports errors
	MoveDrain   MoveReason = "drain"   // an operator wants it empty
	MoveShort   MoveReason = "short"   // the set has fewer members than media want
	MoveBalance MoveReason = "balance" // another node has more room
)

// Process is a running server. Its record lives as long as its lease.
type Process struct {
	ID      atoll.UUID `json:"id"`
	Host    string     `json:"host"`
	PID     int        `json:"pid"`
	Roles   []string   `json:"roles"`
	API     string     `json:"api"`           // address of its control API
	NBD     string     `json:"nbd,omitempty"` // address of its NBD server
	Wire    string     `json:"wire,omitempty"`
	Version string     `json:"version"`
	Started time.Time  `json:"started"`
}

// MediumKind is what a medium is.
type MediumKind string

// Kinds of media.
const (
	KindVolume MediumKind = "volume"
	KindFS     MediumKind = "fs"
	KindDB     MediumKind = "db"
)

// MediumState tells where a medium is in its life.
type MediumState string

// States of a medium. But for the way back from the trash they only go forward:
// deleting takes more than one step, so each is a record that a crash leaves
// behind and a later run finishes.
const (
	MediumLive MediumState = "live"
	// MediumTrashed: its user removed it. It has no name, nobody can acquire it,
	// and it can be made live again; else it becomes detached.
	MediumTrashed MediumState = "trashed"
	// MediumDetached: its user deleted it, so that it has no name and gets no
	// new pins, but clones or views may still read versions of it.
	MediumDetached MediumState = "detached"
	MediumDeleting MediumState = "deleting" // nothing is pinned; segments are being removed
)

// Parent says which version of which medium a clone began as.
type Parent struct {
	Medium  atoll.MediumID `json:"medium"`
	Version uint64         `json:"version"`
	// Base is the clone's first own ordinal; those below are its ancestors'.
	Base atoll.Ordinal `json:"base"`
}

// Ancestor is a medium that a clone may read from: the segments below Base, and
// from the Base of the ancestor before it on, are of this medium.
type Ancestor struct {
	Medium  atoll.MediumID `json:"medium"`
	Version uint64         `json:"version"`
	Base    atoll.Ordinal  `json:"base"`
}

// Pin keeps a version of a medium, and the medium itself, from being removed.
// Its holder is a clone, for as long as the clone has that parent, or a process
// that reads the version, for as long as its session lives.
type Pin struct {
	Medium  atoll.MediumID
	Version uint64
	Clone   atoll.MediumID // holder, if it is a clone
	Process atoll.UUID     // or else the process that reads
	key     string
}

// Policy says how a medium's bytes are kept.
type Policy struct {
	Replicas    int `json:"replicas"`         // copies, 1 to 5
	MinReplicas int `json:"min,omitempty"`    // write on with this many healthy nodes; 0 = one less than Replicas, at least 1
	Segment     int `json:"blocks,omitempty"` // segment size in blocks; 0 = atoll.SegmentBlocks
	// Data and Parity, of coded media: sealed segments are kept as that many
	// shards on as many nodes, any Data of which give everything. Both are 0 for
	// media that keep copies; those that are coded have Replicas copies of what
	// is not encoded yet.
	Data   int `json:"data,omitempty"`
	Parity int `json:"parity,omitempty"`
}

// IsCoded reports whether sealed segments are kept as shards.
func (p Policy) IsCoded() bool { return p.Data != 0 }

// Code returns the code that a policy asks for.
func (p Policy) Code() Code { return Code{p.Data, p.Parity} }

// Redundancy returns the policy in words: "replicas=3" or "ec=4+2".
func (p Policy) Redundancy() string {
	if p.IsCoded() {
		return "ec=" + p.Code().String()
	}
	return fmt.Sprintf("replicas=%d", p.Replicas)
}

// ParseRedundancy is the inverse of Policy.Redundancy. A coded medium keeps what
// is not encoded yet in as many copies as survive the same losses. ErrInvalid.
func ParseRedundancy(s string) (Policy, error) {
	if n, ok := strings.CutPrefix(s, "replicas="); ok {
		if n, err := strconv.Atoi(n); err == nil && n >= 1 && n <= atoll.MaxCopies {
			return Policy{Replicas: n}, nil
		}
	}
	if text, ok := strings.CutPrefix(s, "ec="); ok {
		c, err := ParseCode(text)
		return Policy{Replicas: min(c.Parity+1, atoll.MaxCopies), Data: c.Data, Parity: c.Parity}, err
	}
	return Policy{}, fmt.Errorf("redundancy %q: want replicas=N, N from 1 to %d, or ec=K+M as in ec=4+2: %w", s, atoll.MaxCopies, atoll.ErrInvalid)
}

// Code is an erasure code: how many shards of data, and how many of parity.
type Code struct{ Data, Parity int }

// String returns "4+2".
func (c Code) String() string { return fmt.Sprintf("%d+%d", c.Data, c.Parity) }

// ParseCode is the inverse of Code.String. ErrInvalid, also beyond the limits.
func ParseCode(s string) (c Code, err error) {
	data, parity, _ := strings.Cut(s, "+")
	c.Data, err = strconv.Atoi(data)
	if err == nil {
		c.Parity, err = strconv.Atoi(parity)
	}
	if err != nil || c.check() != nil || c.String() != s {
		return Code{}, fmt.Errorf("parse code %q: want as in 4+2, at most %d in all and %d after the plus sign: %w",
			s, atoll.MaxShards, atoll.MaxCopies, atoll.ErrInvalid)
	}
	return c, nil
}

func (c Code) check() error {
	if c.Data < 1 || c.Parity < 1 || c.Parity > atoll.MaxCopies || c.Data+c.Parity > atoll.MaxShards {
		return fmt.Errorf("%v shards: %w", c, atoll.ErrInvalid)
	}
	return nil
}

// Medium is what a user owns, apart from its contents.
type Medium struct {
	ID      atoll.MediumID    `json:"id"`
	Name    string            `json:"name"`
	Kind    MediumKind        `json:"kind"`
	State   MediumState       `json:"state"`
	Owner   string            `json:"owner"`
	Size    int64             `json:"size,omitempty"` // of a volume, bytes
	Policy  Policy            `json:"policy"`
	Created time.Time         `json:"created"`
	Props   map[string]string `json:"props,omitempty"`
	// Parent and Ancestors, oldest first, of a clone. The last ancestor is the
	// parent.
	Parent    *Parent    `json:"parent,omitempty"`
	Ancestors []Ancestor `json:"ancestors,omitempty"`
	Number    uint64     `json:"number,omitempty"` // small, never given out twice; 0 on media from before there were any
	Trash     *Trash     `json:"trash,omitempty"`  // in state MediumTrashed
	Rev       int64      `json:"-"`
}

// Base returns the medium's first own ordinal.
func (m *Medium) Base() atoll.Ordinal {
	if m.Parent == nil {
		return 1
	}
	return m.Parent.Base
}

// Lane tells which of a medium's two open segments one is.
type Lane uint8

// Lanes. User data, logs and anything that orders writes go to the hot lane;
// tables, map pages and compaction output to the bulk lane. A coded segment is in
// a lane of its own: it is written in one piece, and is nothing before that is
// recorded.
const (
	Hot Lane = iota
	Bulk
	Shards
)

// Unsealed is a segment whose length is not yet fixed.
type Unsealed struct {
	Seg  atoll.SegmentID `json:"seg"`
	Lane Lane            `json:"lane"`
	Size atoll.BlockNo   `json:"size"` // limit in blocks
}

// Sealed is a segment whose length is fixed.
type Sealed struct {
	Seg        atoll.SegmentID `json:"seg"`
	Lane       Lane            `json:"lane"`
	Length     atoll.BlockNo   `json:"len"`
	Unverified []atoll.NodeID  `json:"unv,omitempty"` // copies not known to be whole
}

// BlockRef points at bytes in a medium's log.
type BlockRef struct {
	Seg    atoll.SegmentID `json:"seg"`
	Block  atoll.BlockNo   `json:"block"`
	Blocks atoll.BlockNo   `json:"blocks"`
	CRC    uint32          `json:"crc"` // CRC32C of those bytes
}

// Head is what the owner of a medium changes: who owns it, where its manifest
// is, and which segments came after. It is small, and every change of it is a
// compare-and-set under the owner's epoch.
type Head struct {
	Medium  atoll.MediumID `json:"medium"`
	Epoch   atoll.Epoch    `json:"epoch"`
	Process atoll.UUID     `json:"process"` // owner; zero when cleanly closed
	// Manifest is the last manifest written; nil before the first.
	Manifest *BlockRef `json:"manifest,omitempty"`
	// Next is the ordinal that the next segment gets.
	Next atoll.Ordinal `json:"next"`
	// Unsealed segments, oldest first, each registered before it is used.
	Unsealed []Unsealed `json:"unsealed,omitempty"`
	// Sealed since the manifest was written, oldest first.
	Sealed []Sealed `json:"sealed,omitempty"`
	// Dropped lists segments to be removed from nodes: they were taken out of
	// the manifest, or registered and never used.
	Dropped []atoll.SegmentID `json:"dropped,omitempty"`
	Rev     int64             `json:"-"`
}
