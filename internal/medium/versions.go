package medium

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

// Flags of a version.
type Flags uint32

// Flags of a version.
const (
	// FlagDeleting: its user deleted it. It stays until nothing pins it and the
	// kind has found out what only it holds.
	FlagDeleting Flags = 1 << iota
	// FlagInternal: not made by the user, and not shown.
	FlagInternal
	// FlagProtected: not to be deleted before the flag is taken away.
	FlagProtected
)

// Version is a recorded state of a medium.
type Version struct {
	Number uint64 // from 1 on; never given out again
	Name   string // "" if it has none
	Memo   string
	Time   time.Time
	Parent uint64 // version it grew from; 0 none
	// At is a position in the hot lane (check bits 0): blocks of earlier places
	// are older than the version.
	At     atoll.Location
	Seq    uint64 // of the record at that position
	Epoch  uint32 // the kind's epoch there
	Size   int64  // bytes
	Used   int64  // bytes mapped
	Unique int64  // bytes that only this version holds; -1 not known
	Flags  Flags
	Props  map[string]string // small; not to be changed in place
	Root   Ref               // the kind's root, set by Commit
	// RootLen is the length of the kind's root in bytes, set by Commit.
	RootLen int
}

// Hidden reports whether a version is one that users do not see.
func (v *Version) Hidden() bool { return v.Flags&(FlagDeleting|FlagInternal) != 0 }

// Limits of a version.
const (
	MaxMemo  = 4096 // bytes
	maxProps = 2048 // bytes of names and values
)

// State is the versions of a medium and how they hang together, as of one
// manifest.
type State struct {
	Versions   []Version // by number, with the hidden ones
	CurParent  uint64    // version that the present state grew from; 0 none
	Release    uint64    // version named release; 0 none
	LastNumber uint64    // highest number given out
	Ancestors  []catalog.Ancestor
}

// Find returns the version with a number, nil if there is none.
func (s *State) Find(number uint64) *Version {
	i, ok := slices.BinarySearchFunc(s.Versions, number, func(v Version, n uint64) int { return cmp.Compare(v.Number, n) })
	if !ok {
		return nil
	}
	return &s.Versions[i]
}

// Named returns the version with a name that users see, nil if there is none.
func (s *State) Named(name string) *Version {
	for i := range s.Versions {
		if v := &s.Versions[i]; v.Name == name && name != "" && !v.Hidden() {
			return v
		}
	}
	return nil
}

// Children returns the numbers of the versions that grew from one.
func (s *State) Children(number uint64) (list []uint64) {
	for i := range s.Versions {
		if s.Versions[i].Parent == number {
			list = append(list, s.Versions[i].Number)
		}
	}
	return list
}

// VersionSpec names a version as users do: by number, by name, as the last one,
// or as the one released.
type VersionSpec struct {
	Number  uint64
	Name    string
	Last    bool
	Release bool
}

// ParseSpec reads what stands behind the "@". "cur" is no version and gives the
// zero spec.
func ParseSpec(s string) (VersionSpec, error) {
	switch s {
	case "cur":
		return VersionSpec{}, nil
	case "last":
		return VersionSpec{Last: true}, nil
	case "release":
		return VersionSpec{Release: true}, nil
	}
	if n, err := strconv.ParseUint(s, 10, 64); err == nil && n > 0 {
		return VersionSpec{Number: n}, nil
	}
	if err := catalog.ValidateVersionName(s); err != nil {
		return VersionSpec{}, err
	}
	return VersionSpec{Name: s}, nil
}

// IsZero reports whether the spec names the present state.
func (s VersionSpec) IsZero() bool { return s == VersionSpec{} }

// String is the inverse of ParseSpec.
func (s VersionSpec) String() string {
	switch {
	case s.Last:
		return "last"
	case s.Release:
		return "release"
	case s.Name != "":
		return s.Name
	case s.Number != 0:
		return strconv.FormatUint(s.Number, 10)
	}
	return "cur"
}

// Resolve returns the version that a spec names, hidden ones only by number and
// those that are being deleted never. ErrNotExist.
func (s *State) Resolve(spec VersionSpec) (Version, error) {
	var v *Version
	switch {
	case spec.Last:
		for i := range s.Versions {
			if !s.Versions[i].Hidden() {
				v = &s.Versions[i]
			}
		}
	case spec.Release:
		v = s.Find(s.Release)
	case spec.Name != "":
		v = s.Named(spec.Name)
	default:
		v = s.Find(spec.Number)
	}
	if v == nil || v.Flags&FlagDeleting != 0 {
		return Version{}, fmt.Errorf("version %v: %w", spec, atoll.ErrNotExist)
	}
	return *v, nil
}

// clone returns a state that can be changed without changing s.
func (s *State) clone() State {
	c := *s
	c.Versions, c.Ancestors = slices.Clone(s.Versions), slices.Clone(s.Ancestors)
	for i := range c.Versions {
		c.Versions[i].Props = maps.Clone(c.Versions[i].Props)
	}
	return c
}

// check returns what is wrong with a state.
func (s *State) check() error {
	names := map[string]bool{}
	for i := range s.Versions {
		v := &s.Versions[i]
		if v.Number == 0 || i > 0 && v.Number <= s.Versions[i-1].Number {
			return fmt.Errorf("version %d after version %d: %w", v.Number, s.Versions[max(i, 1)-1].Number, atoll.ErrExist)
		}
		if v.Parent != 0 && (v.Parent >= v.Number || s.Find(v.Parent) == nil) {
			return fmt.Errorf("version %d grew from version %d, which is not there: %w", v.Number, v.Parent, atoll.ErrInvalid)
		}
		if err := v.check(); err != nil {
			return err
		}
		if v.Name != "" && !v.Hidden() {
			if names[v.Name] {
				return fmt.Errorf("version name %q: %w", v.Name, atoll.ErrExist)
			}
			names[v.Name] = true
		}
	}
	if s.CurParent != 0 && s.Find(s.CurParent) == nil {
		return fmt.Errorf("the present state grew from version %d, which is not there: %w", s.CurParent, atoll.ErrInvalid)
	}
	if s.Release != 0 && s.Find(s.Release) == nil {
		return fmt.Errorf("version %d is named release and not there: %w", s.Release, atoll.ErrInvalid)
	}
	return nil
}

func (v *Version) check() error {
	if v.Name != "" && v.Flags&FlagInternal == 0 {
		if err := catalog.ValidateVersionName(v.Name); err != nil {
			return err
		}
	}
	n := 0
	for k, p := range v.Props {
		n += len(k) + len(p)
	}
	if len(v.Memo) > MaxMemo || n > maxProps || len(v.Name) > maxName {
		return fmt.Errorf("version %d with a memo of %d bytes (at most %d) and properties of %d bytes (at most %d): %w",
			v.Number, len(v.Memo), MaxMemo, n, maxProps, atoll.ErrTooLarge)
	}
	return nil
}

// remove takes a version out; its children and the present state then grew from
// what it grew from.
func (s *State) remove(number uint64) error {
	v := s.Find(number)
	if v == nil {
		return fmt.Errorf("remove version %d: %w", number, atoll.ErrNotExist)
	}
	parent := v.Parent
	s.Versions = slices.DeleteFunc(s.Versions, func(v Version) bool { return v.Number == number })
	for i := range s.Versions {
		if s.Versions[i].Parent == number {
			s.Versions[i].Parent = parent
		}
	}
	if s.CurParent == number {
		s.CurParent = parent
	}
	if s.Release == number {
		s.Release = 0
	}
	return nil
}

// NewVersion is a version to be added, with the kind's root, at most MaxRoot
// bytes.
type NewVersion struct {
	Version
	RootBytes []byte
}

// Commit is a change of what the manifest says.
type Commit struct {
	// Mark and Root are those of a checkpoint (see Checkpoint). A zero Mark
	// leaves the checkpoint that stands.
	Mark Mark
	Root []byte
	// Add lists new versions, Remove the numbers of those to go. The live counts
	// are stored as they are when Commit is called: they must be those of the
	// roots that result (M4).
	Add    []NewVersion
	Remove []uint64
	// Change makes any other change, after the above. It is called with a copy,
	// under the manifest's lock, perhaps more than once, and may be nil. It must
	// not touch Root and RootLen of a version.
	Change func(*State)
}

// State returns the versions as of the last manifest. The caller must not change
// the properties in it.
func (m *Medium) State() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.mu.man.state()
	s.Versions = slices.Clone(s.Versions)
	s.LastNumber = max(s.LastNumber, m.mu.lastNumber)
	s.Ancestors = slices.Clone(m.Info().Ancestors)
	return s
}

// state returns the versions of a manifest; the slice is the manifest's.
func (m *manifest) state() State {
	return State{Versions: m.Versions, CurParent: m.CurParent, Release: m.Release, LastNumber: m.LastNumber}
}

// NewVersionNumber gives out the number for a new version. It is never given out
// again once a Commit has followed; one that a record in the log names counts as
// given out when the replay tells UseVersionNumber.
func (m *Medium) NewVersionNumber() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.lastNumber = max(m.mu.lastNumber, m.mu.man.LastNumber) + 1
	return m.mu.lastNumber
}

// UseVersionNumber notes that a number was given out.
func (m *Medium) UseVersionNumber(n uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.lastNumber = max(m.mu.lastNumber, n)
}

// Commit writes a manifest with the change c. Durable on return; after an error
// it may or may not have been made. It waits for other manifests that are being
// written; appends and reads go on.
func (m *Medium) Commit(ctx context.Context, c Commit) error {
	if err := m.check(); err != nil {
		return err
	}
	if len(c.Root) > MaxRoot || c.Mark.Seq == 0 && len(c.Root) > 0 {
		return fmt.Errorf("checkpoint medium %v: root of %d bytes, mark %+v: %w", m.id, len(c.Root), c.Mark, atoll.ErrInvalid)
	}
	ck := &checkpoint{mark: c.Mark, root: slices.Clone(c.Root), count: true}
	for _, v := range c.Add {
		if len(v.RootBytes) > MaxRoot || len(v.RootBytes) == 0 {
			return fmt.Errorf("add version %d to medium %v: root of %d bytes: %w", v.Number, m.id, len(v.RootBytes), atoll.ErrInvalid)
		}
		v.RootBytes = slices.Clone(v.RootBytes)
		ck.roots = append(ck.roots, v)
	}
	if len(c.Add)+len(c.Remove) > 0 || c.Change != nil {
		ck.edit = c.apply
	}
	return m.writeManifest(ctx, ck)
}

// apply makes the change of versions.
func (c *Commit) apply(s *State) error {
	for _, v := range c.Add {
		v.Root, v.RootLen = Ref{}, len(v.RootBytes)
		i, found := slices.BinarySearchFunc(s.Versions, v.Number, func(v Version, n uint64) int { return cmp.Compare(v.Number, n) })
		if found {
			return fmt.Errorf("add version %d: %w", v.Number, atoll.ErrExist)
		}
		v.Props = maps.Clone(v.Props)
		s.Versions = slices.Insert(s.Versions, i, v.Version)
		s.LastNumber = max(s.LastNumber, v.Number)
	}
	for _, n := range c.Remove {
		if err := s.remove(n); err != nil {
			return err
		}
	}
	if c.Change != nil {
		c.Change(s)
	}
	return nil
}

// Edit writes a manifest in which the versions are as change leaves them: names,
// flags, parents, release. It may remove versions only if nothing is counted for
// them. change gets a copy, perhaps more than once. Durable on return. An error of
// change is returned, and nothing happened.
func (m *Medium) Edit(ctx context.Context, change func(*State) error) error {
	if err := m.check(); err != nil {
		return err
	}
	return m.writeManifest(ctx, &checkpoint{edit: change})
}

// AppendMark appends an entry of one record of the kind to the hot lane and
// returns the mark at it: a replay from there gives that record first. When it
// returns nil the entry is on stable storage. None of the kind's bulk appends
// may be between Submit and Live or Hold meanwhile (M4).
func (m *Medium) AppendMark(ctx context.Context, e *stream.Entry) (Mark, error) {
	if e.Records() != 1 {
		return Mark{}, fmt.Errorf("append mark of %d records: %w", e.Records(), atoll.ErrInvalid)
	}
	m.reserve.Add(1)
	defer m.reserve.Add(-1)
	bulk := lowest(m.own.head(), catalog.Bulk)
	if err := m.submit(ctx, catalog.Hot, e); err != nil {
		return Mark{}, err
	}
	count := m.appended.Add(int64(e.Blocks()) + 1)
	if err := m.outcome(e.Wait(ctx)); err != nil {
		return Mark{}, err
	}
	m.mu.Lock()
	bulk = max(bulk, m.mu.man.Mark.Bulk)
	m.mu.Unlock()
	return Mark{Ordinal: e.Seg().Ordinal, Block: e.Header(), Seq: e.Seq(), Bulk: bulk, count: count}, nil
}

// ReadRoot returns the kind's root of a version. ErrNotExist if there is no such
// version.
func (m *Medium) ReadRoot(ctx context.Context, number uint64) ([]byte, error) {
	var last Ref
	for {
		if err := m.check(); err != nil {
			return nil, err
		}
		m.mu.Lock()
		s := m.mu.man.state()
		v := s.Find(number)
		m.mu.Unlock()
		if v == nil {
			return nil, fmt.Errorf("read root of version %d of medium %v: %w", number, m.id, atoll.ErrNotExist)
		}
		p, err := readVersionRoot(ctx, m.opts.Nodes, m.id, v)
		if err == nil {
			return p, nil
		}
		if !moved(err) || v.Root == last { // else it was written anew elsewhere
			return nil, fmt.Errorf("read root of version %d of medium %v: %w", number, m.id, err)
		}
		last = v.Root
	}
}

// moved reports whether an error can mean that the bytes are elsewhere by now: no
// copy has them, or none of those that answer.
func moved(err error) bool {
	return errors.Is(err, atoll.ErrNotExist) || errors.Is(err, atoll.ErrCorrupt) || errors.Is(err, atoll.ErrUnavailable)
}

func readVersionRoot(ctx context.Context, nodes *stream.Nodes, id atoll.MediumID, v *Version) ([]byte, error) {
	p, err := readRecord(ctx, nodes, id, v.Root)
	if err != nil {
		return nil, err
	}
	if v.RootLen > len(p) {
		return nil, fmt.Errorf("root of version %d has %d bytes of %d: %w", v.Number, len(p), v.RootLen, atoll.ErrCorrupt)
	}
	return p[:v.RootLen], nil
}

// readRecord reads a record of this package and checks it against its reference.
func readRecord(ctx context.Context, nodes *stream.Nodes, id atoll.MediumID, r Ref) ([]byte, error) {
	if r.Blocks == 0 || r.Blocks > atoll.MaxBatchBlocks {
		return nil, fmt.Errorf("read %d blocks at %d:%d: %w", r.Blocks, r.Ordinal, r.Block, atoll.ErrCorrupt)
	}
	p := make([]byte, r.Blocks.Bytes())
	if err := nodes.Read(ctx, r.segment(id), r.Block, p); err != nil {
		return nil, err
	}
	if c := segment.CRC(p); c != r.CRC {
		return nil, fmt.Errorf("read %d:%d: checksum %08x, want %08x: %w", r.Ordinal, r.Block, c, r.CRC, atoll.ErrCorrupt)
	}
	return p, nil
}

// Pins returns how many clones and readers hold each version of the medium, as
// the catalog knows now. Those of versions that are marked FlagDeleting in a
// durable manifest can only go away.
func (m *Medium) Pins(ctx context.Context) (map[uint64]int, error) {
	pins, err := m.opts.Catalog.Pins(ctx, m.id)
	if err != nil {
		return nil, fmt.Errorf("look for pins of medium %v: %w", m.id, err)
	}
	count := map[uint64]int{}
	for _, p := range pins {
		count[p.Version]++
	}
	return count, nil
}
