package volume

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
)

// OpenVersion opens a version of a volume for reading: Read, Extents, Prefetch,
// Depth and Check, and Diff against other versions, where 0 is this one. The
// caller keeps the view and closes it after the volume.
func OpenVersion(ctx context.Context, s ViewStore, o Options) (*Volume, error) {
	o.ReadOnly, o.Mode = true, Writethrough
	v, err := Open(ctx, viewStore{s}, o)
	if err != nil {
		return nil, fmt.Errorf("version %d: %w", s.Version().Number, err)
	}
	return v, nil
}

// viewStore makes a Store of a ViewStore: nothing can be changed through it.
type viewStore struct{ ViewStore }

var _ Store = viewStore{}

func (s viewStore) readOnly() error {
	return fmt.Errorf("version %d of medium %v: %w", s.Version().Number, s.Info().ID, atoll.ErrReadOnly)
}

// Info returns the record, with the size that the version has.
func (s viewStore) Info() catalog.Medium {
	info := s.ViewStore.Info()
	info.Size = s.Version().Size
	return info
}

func (s viewStore) Update(context.Context, func(*catalog.Medium)) error     { return s.readOnly() }
func (s viewStore) Replay(context.Context, func(medium.Record) error) error { return nil }
func (s viewStore) Mark() medium.Mark                                       { return medium.Mark{} }
func (s viewStore) MarkAt(medium.Record) medium.Mark                        { return medium.Mark{} }
func (s viewStore) Commit(context.Context, medium.Commit) error             { return s.readOnly() }
func (s viewStore) Edit(context.Context, func(*medium.State) error) error   { return s.readOnly() }
func (s viewStore) NewVersionNumber() uint64                                { return 0 }
func (s viewStore) UseVersionNumber(uint64)                                 {}
func (s viewStore) Pins(context.Context) (map[uint64]int, error)            { return nil, s.readOnly() }
func (s viewStore) Detach(context.Context) error                            { return s.readOnly() }
func (s viewStore) Live(atoll.Ordinal, int)                                 {}
func (s viewStore) NewEntry() Entry                                         { return nil }
func (s viewStore) Submit(context.Context, catalog.Lane, Entry) error       { return s.readOnly() }
func (s viewStore) Append(context.Context, catalog.Lane, Entry) error       { return s.readOnly() }
func (s viewStore) Victims(int) []medium.Victim                             { return nil }
func (s viewStore) Move(context.Context, atoll.Ordinal, []medium.Run) error { return s.readOnly() }
func (s viewStore) Room() medium.Room                                       { return medium.Room{} }
func (s viewStore) Reclaimable() int64                                      { return 0 }
func (s viewStore) Waiting() int64                                          { return 0 }
func (s viewStore) AppendMark(context.Context, Entry) (medium.Mark, error) {
	return medium.Mark{}, s.readOnly()
}
func (s viewStore) Placed(context.Context, atoll.Ordinal, func(medium.Placed) error) error {
	return s.readOnly()
}
