package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
)

// An import writes a difference into a volume's working state, of which a hidden
// version is kept as the way back. While it is under way nobody else may use the
// volume. It ends with
//
//	commit   the new version is made, marked with the import's id; then the note in
//	         the record goes, then the hidden version
//	abort    the working state goes back to the hidden version; then the note, then
//	         the version
//
// The note in the record (propStaging) says what to do after a crash: a volume
// that is opened with one is taken back, unless the version marked with the
// import's id is there: then the import had been committed.

// silence is how long an import lives without a connection or a sign of life.
const silence = time.Minute

// Properties of the versions that imports make.
const (
	propBase   = "import-base" // of the hidden version: the way back
	propImport = "import"      // of the version made by the commit
)

// staging is an import that is under way.
type staging struct {
	id   string
	note stagingNote
	seen time.Time // last sign of life; guarded by volumeSet.mu
	// begin and written are the time and the volume's count of bytes at the start.
	begin   time.Time
	written int64
	begun   bool // the end has, which it does once; guarded by volumeSet.mu
}

// stagingNote is propStaging in the record.
type stagingNote struct {
	ID   string `json:"id"`
	Base uint64 `json:"base"` // number of the hidden version
}

// BeginImport implements api.Versions.
func (b *backend) BeginImport(ctx context.Context, r *atollv1.BeginImportRequest) (*atollv1.BeginImportResponse, error) {
	if r.To != "" {
		if err := catalog.ValidateVersionName(r.To); err != nil {
			return nil, err
		}
	}
	if r.SizeBytes != 0 {
		if err := volume.CheckSize(r.SizeBytes); err != nil {
			return nil, err
		}
	}
	rec, err := b.s.volumes.find(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsBegin); done {
		return out, err
	}
	if b.s.nbd == nil {
		return nil, api.WithHint(fmt.Errorf("this server has no NBD gateway to import by: %w", atoll.ErrUnsupported), "ask a server with the gateway role")
	}
	o, err := b.s.volumes.acquire(ctx, rec)
	if err != nil {
		return nil, err
	}
	s, err := b.stage(ctx, o, rec, r)
	b.s.volumes.release(o)
	if err != nil {
		return nil, err
	}
	name := stagingExport(rec.Name, s.id)
	b.s.log.Info("import begun", "medium", rec.ID, "name", rec.Name, "import", s.id)
	return &atollv1.BeginImportResponse{ImportId: s.id, Export: name, Urls: b.urls(name)}, nil
}

// stage makes an import the only user of an open volume, checks the start, and
// keeps the way back.
func (b *backend) stage(ctx context.Context, o *openVolume, rec catalog.Medium, r *atollv1.BeginImportRequest) (*staging, error) {
	s := &staging{id: b.s.newID(), seen: time.Now(), begin: time.Now(), written: o.vol.Stats().WriteBytes}
	if err := b.s.volumes.claim(ctx, o, s, b.connections); err != nil {
		return nil, err
	}
	err := b.prepare(ctx, o, rec, s, r)
	if err != nil {
		away, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		return nil, errors.Join(err, b.s.volumes.takeBack(away, o, s))
	}
	return s, nil
}

// prepare checks that the working state is what the difference starts from, notes
// the import, and gives the volume its new size.
func (b *backend) prepare(ctx context.Context, o *openVolume, rec catalog.Medium, s *staging, r *atollv1.BeginImportRequest) error {
	st := o.state()
	if r.To != "" && st.Named(r.To) != nil {
		return api.WithHint(fmt.Errorf("volume %q has a version %q: %w", rec.Name, r.To, atoll.ErrExist), "the difference was imported before, or another name was meant")
	}
	if r.From != "" {
		spec, err := medium.ParseSpec(r.From)
		if err != nil {
			return err
		}
		from, err := resolve(o, spec)
		if err == nil {
			err = unchanged(ctx, o, from)
		}
		if err != nil {
			return err
		}
	}
	base, err := o.vol.Backup(ctx, volume.BackupOptions{Flags: medium.FlagInternal, Props: map[string]string{propBase: s.id}})
	if err != nil {
		return err
	}
	s.note = stagingNote{s.id, base.Number}
	text, err := json.Marshal(s.note)
	if err != nil {
		return err
	}
	if err := o.medium.Update(ctx, func(m *catalog.Medium) { setProp(m, propStaging, string(text)) }); err != nil {
		return err
	}
	if r.SizeBytes != 0 && r.SizeBytes != o.vol.Size() {
		return o.vol.Resize(ctx, r.SizeBytes)
	}
	return nil
}

// unchanged is ErrConflict when the working state is not a version's.
func unchanged(ctx context.Context, o *openVolume, from medium.Version) error {
	differs := o.vol.Size() != from.Size
	if !differs {
		err := o.vol.Diff(ctx, from.Number, 0, 0, from.Size, func(int64, int64, bool) bool {
			differs = true
			return false
		})
		if err != nil {
			return err
		}
	}
	if differs {
		return api.WithHint(fmt.Errorf("volume %q was changed since version %s: %w", o.name, versionLabel(from), atoll.ErrConflict),
			"a difference applies to the very state it starts from: restore the volume to that version first, if what was written since may go")
	}
	return nil
}

// claim makes an import the only user of a volume. ErrBusy when it has others.
func (v *volumeSet) claim(ctx context.Context, o *openVolume, s *staging, connections func(string) int) error {
	busy := func(what string) error {
		return api.WithHint(fmt.Errorf("volume %q %s: %w", o.name, what, atoll.ErrBusy), "disconnect its clients first")
	}
	for try := 0; ; try++ {
		v.mu.Lock()
		taken, others := o.staging != nil, o.refs > 1
		if !taken && !others {
			o.staging = s
		}
		v.mu.Unlock()
		switch {
		case taken:
			return api.WithHint(fmt.Errorf("volume %q is being imported to: %w", o.name, atoll.ErrBusy), "wait until that import has ended")
		case !others:
			return nil
		case try >= 50:
			if n := connections(o.name); n > 0 {
				return busy(fmt.Sprintf("has %d NBD connections", n))
			}
			return busy("is in use")
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return busy("is in use")
		}
	}
}

// imported finds an import that is under way here and begins its end, if ending.
func (v *volumeSet) imported(id string, ending bool) (*openVolume, *staging, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, o := range v.mu.open {
		if s := o.staging; s != nil && s.id == id && !s.begun {
			s.seen = time.Now()
			if ending {
				s.begun = true
			}
			o.refs++
			return o, s, nil
		}
	}
	return nil, nil, api.WithHint(fmt.Errorf("import %s: %w", id, atoll.ErrNotExist), "it has ended: without a sign of life it is taken back after a minute; begin again")
}

// stagingOf returns the import that is under way to an open volume, if any.
func (v *volumeSet) stagingOf(o *openVolume) *staging {
	v.mu.Lock()
	defer v.mu.Unlock()
	return o.staging
}

// CommitImport implements api.Versions.
func (b *backend) CommitImport(ctx context.Context, r *atollv1.CommitImportRequest) (*atollv1.Version, error) {
	if r.To != "" {
		if err := catalog.ValidateVersionName(r.To); err != nil {
			return nil, err
		}
	}
	rec, err := b.s.volumes.find(ctx, r.Medium)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsCommit); done {
		return out, err
	}
	o, s, err := b.s.volumes.imported(r.ImportId, true)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	err = b.s.volumes.quiesce(ctx, o, s)
	var out *atollv1.Version
	if err == nil {
		out, err = b.commitImport(ctx, o, rec, s, r)
	}
	if err != nil {
		away, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		return nil, errors.Join(err, b.s.volumes.takeBack(away, o, s))
	}
	b.s.log.Info("import committed", "medium", rec.ID, "name", rec.Name, "import", s.id)
	return out, nil
}

func (b *backend) commitImport(ctx context.Context, o *openVolume, rec catalog.Medium, s *staging, r *atollv1.CommitImportRequest) (*atollv1.Version, error) {
	defer b.s.metrics.timed("import")()
	v, err := b.s.volumes.commitPoint(ctx, o, s, r)
	if err != nil {
		return nil, err
	}
	out := &atollv1.Version{Medium: rec.Name, MediumId: rec.ID.String()}
	if v.Number != 0 {
		out = versionMessage(rec, o.state(), v, nil)
	}
	if err := o.medium.Update(ctx, func(m *catalog.Medium) { setProp(m, propStaging, "") }); err != nil {
		return nil, err
	}
	// From here on it is committed. What is left is tidied at the next open, too.
	if err := o.vol.DeleteVersion(ctx, s.note.Base); err != nil {
		b.s.log.Warn("way back of an import not removed; the next open does it", "medium", rec.ID, "ver", s.note.Base, "err", err)
	}
	b.s.volumes.unclaim(o, s)
	return out, nil
}

// commitPoint makes the version of an import, if it wants one: from then on the
// import is committed.
func (v *volumeSet) commitPoint(ctx context.Context, o *openVolume, s *staging, r *atollv1.CommitImportRequest) (medium.Version, error) {
	if err := o.vol.Flush(ctx); err != nil || r.To == "" {
		return medium.Version{}, err
	}
	props := map[string]string{propImport: s.id}
	for k, p := range r.Properties {
		props[k] = p
	}
	return o.vol.Backup(ctx, volume.BackupOptions{Name: r.To, Memo: r.Memo, Protected: r.Protected, Props: props})
}

// unclaim ends an import: others may use the volume.
func (v *volumeSet) unclaim(o *openVolume, s *staging) {
	v.mu.Lock()
	if o.staging == s {
		o.staging = nil
	}
	o.idle = time.Now()
	v.mu.Unlock()
}

// quiesce cuts the importer off and waits until nothing that it sent is under way
// any more: it must not land in what comes after.
func (v *volumeSet) quiesce(ctx context.Context, o *openVolume, s *staging) error {
	limit := time.NewTimer(quiesceWait)
	defer limit.Stop()
	for {
		v.disconnect(o.name)
		v.mu.Lock()
		alone := o.users == 0
		v.mu.Unlock()
		if alone {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
			continue
		case <-limit.C:
		case <-ctx.Done():
		}
		return fmt.Errorf("import %s: what was written last does not end: %w", s.id, atoll.ErrBusy)
	}
}

// quiesceWait bounds how long requests of an import are waited for at its end.
const quiesceWait = 5 * time.Second

// takeBack undoes an import and ends it. When that fails the volume is closed,
// and the next open does it.
func (v *volumeSet) takeBack(ctx context.Context, o *openVolume, s *staging) error {
	err := v.quiesce(ctx, o, s)
	if err == nil {
		err = restoreBase(ctx, o, s.note)
	}
	if err != nil && errors.Is(err, atoll.ErrNotExist) && s.note.Base == 0 {
		err = nil // nothing had been noted yet
	}
	v.unclaim(o, s)
	if err != nil {
		v.drop(o)
		return fmt.Errorf("take back import %s: %w", s.id, err)
	}
	return nil
}

// restoreBase takes a volume back to where an import began, or notes that the
// import was committed.
func restoreBase(ctx context.Context, o *openVolume, note stagingNote) error {
	var base uint64
	committed := false
	for _, v := range o.state().Versions {
		if v.Flags&medium.FlagDeleting == 0 && v.Number == note.Base {
			base = v.Number
		}
		committed = committed || note.ID != "" && v.Props[propImport] == note.ID
	}
	if base != 0 && !committed {
		if err := o.vol.Restore(ctx, base); err != nil {
			return err
		}
	}
	if err := o.medium.Update(ctx, func(m *catalog.Medium) { setProp(m, propStaging, "") }); err != nil {
		return err
	}
	if base != 0 {
		return o.vol.DeleteVersion(ctx, base)
	}
	return nil
}

// keepTemporary is how long versions are kept that a client made for itself and
// did not delete.
const keepTemporary = 24 * time.Hour

// tidyImports undoes what a crash left of imports, before anyone uses the volume,
// and removes versions that clients forgot.
func tidyImports(ctx context.Context, o *openVolume) error {
	if text := o.medium.Info().Props[propStaging]; text != "" {
		var note stagingNote
		if err := json.Unmarshal([]byte(text), &note); err != nil {
			return fmt.Errorf("note of an import: %w: %w", err, atoll.ErrCorrupt)
		}
		if err := restoreBase(ctx, o, note); err != nil {
			return fmt.Errorf("take back import %s: %w", note.ID, err)
		}
	}
	for _, v := range o.state().Versions {
		old := v.Props[propTemporary] != "" && time.Since(v.Time) > keepTemporary
		if (v.Props[propBase] != "" || old) && v.Flags&medium.FlagDeleting == 0 {
			if err := o.vol.DeleteVersion(ctx, v.Number); err != nil {
				return fmt.Errorf("remove hidden version %d: %w", v.Number, err)
			}
		}
	}
	return nil
}

// AbortImport implements api.Versions.
func (b *backend) AbortImport(ctx context.Context, r *atollv1.AbortImportRequest) (*atollv1.AbortImportResponse, error) {
	rec, err := b.s.volumes.find(ctx, r.Medium)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsAbort); done {
		return out, err
	}
	o, s, err := b.s.volumes.imported(r.ImportId, true)
	if err != nil {
		return nil, err
	}
	defer b.s.volumes.release(o)
	err = b.s.volumes.takeBack(ctx, o, s)
	b.s.log.Info("import taken back", "medium", rec.ID, "name", rec.Name, "import", s.id, "err", err)
	return &atollv1.AbortImportResponse{}, err
}

// KeepImport implements api.Versions.
func (b *backend) KeepImport(ctx context.Context, r *atollv1.KeepImportRequest) (*atollv1.KeepImportResponse, error) {
	rec, err := b.s.volumes.find(ctx, r.Medium)
	if err != nil {
		return nil, err
	}
	if out, done, err := forward(ctx, b, rec, r, versionsKeep); done {
		return out, err
	}
	o, _, err := b.s.volumes.imported(r.ImportId, false)
	if err != nil {
		return nil, err
	}
	b.s.volumes.release(o)
	return &atollv1.KeepImportResponse{}, nil
}

// expireImports takes back the imports of which nothing is heard any more.
func (v *volumeSet) expireImports(ctx context.Context, after time.Duration) {
	alive := map[string]bool{}
	if v.s.nbd != nil {
		for _, c := range v.s.nbd.Connections() {
			_, _, id := splitName(c.Export)
			alive[id] = true
		}
	}
	var silent []string
	v.mu.Lock()
	for _, o := range v.mu.open {
		if s := o.staging; s != nil && !s.begun {
			if alive[s.id] {
				s.seen = time.Now()
			} else if time.Since(s.seen) >= after {
				silent = append(silent, s.id)
			}
		}
	}
	v.mu.Unlock()
	for _, id := range silent {
		o, s, err := v.imported(id, true)
		if err != nil {
			continue // it has ended by itself
		}
		v.s.log.Warn("import taken back: nothing was heard of it", "medium", o.id, "name", o.name, "import", id)
		if err := v.takeBack(ctx, o, s); err != nil {
			v.s.log.Warn("import not taken back yet; the next open does it", "medium", o.id, "err", err)
		}
		v.release(o)
	}
}
