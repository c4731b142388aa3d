package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/gateway/nbd"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/medium/volume"
)

// viewKey names a version that is open for reading.
type viewKey struct {
	id     atoll.MediumID
	number uint64
}

// openView is a version that users of this server read. It needs no ownership;
// a pin keeps what it reads until it is closed, deleted or not.
type openView struct {
	key  viewKey
	view *medium.View
	vol  *volume.Volume
	dev  nbd.Device
	refs int // guarded by volumeSet.mu
}

// maxPeeks bounds how many volumes that are not open here are looked into to
// list their versions.
const maxPeeks = 64

// visible lists the versions that users see.
func visible(st medium.State) []medium.Version {
	return slices.DeleteFunc(st.Versions, func(v medium.Version) bool { return v.Hidden() })
}

// versionLabel is what a version is called: by its name, else its number.
func versionLabel(v medium.Version) string {
	if v.Name != "" {
		return v.Name
	}
	return strconv.FormatUint(v.Number, 10)
}

// describeVersion is a line about a version for people.
func describeVersion(r catalog.Medium, v medium.Version) string {
	text := fmt.Sprintf("%s, snapshot %d of %s, %s", atoll.FormatSize(v.Size), v.Number, r.Name, v.Time.UTC().Format(time.DateTime))
	if v.Memo != "" {
		text += ", " + v.Memo
	}
	return text
}

// state is what an open volume's versions are.
func (o *openVolume) state() medium.State { return o.vol.State() }

// listed returns the versions of a volume that users see. One that is not open
// here is looked into while peeks lasts; a volume that cannot be read has none.
func (v *volumeSet) listed(ctx context.Context, r catalog.Medium, peeks *int) []medium.Version {
	v.mu.Lock()
	o := v.mu.open[r.ID]
	v.mu.Unlock()
	if o != nil && o.usable() {
		return visible(o.state())
	}
	if *peeks <= 0 {
		return nil
	}
	*peeks--
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	view, err := medium.OpenView(ctx, v.options(), r.ID, medium.VersionSpec{Last: true})
	if err != nil {
		return nil
	}
	defer view.Close(ctx)
	return visible(view.State())
}

// Contexts implements nbd.ContextLister.
func (v *volumeSet) Contexts(ctx context.Context, name string) ([]string, error) {
	vol, version, _ := splitName(name)
	r, err := v.exported(ctx, vol)
	if err != nil {
		return nil, err
	}
	peeks := 1
	versions := v.listed(ctx, r, &peeks)
	if version == "" {
		return contextNames(versions, 0), nil
	}
	spec, err := medium.ParseSpec(version)
	if err != nil {
		return nil, err
	}
	st := medium.State{Versions: versions}
	if spec.Release { // only the state itself knows; opening tells more
		return []string{nbd.ContextDepth}, nil
	}
	x, err := st.Resolve(spec)
	if err != nil {
		return nil, err
	}
	return contextNames(versions, x.Number), nil
}

// statVersion describes the export of a version.
func (v *volumeSet) statVersion(ctx context.Context, r catalog.Medium, version string) (nbd.Info, error) {
	spec, err := medium.ParseSpec(version)
	if err != nil {
		return nbd.Info{}, err
	}
	view, err := medium.OpenView(ctx, v.options(), r.ID, spec)
	if err != nil {
		return nbd.Info{}, err
	}
	defer view.Close(ctx)
	return versionInfo(r, view.Version()), nil
}

func versionInfo(r catalog.Medium, x medium.Version) nbd.Info {
	return nbd.Info{Name: r.Name + "@" + versionLabel(x), Description: describeVersion(r, x), Size: x.Size, ReadOnly: true}
}

// openVersion opens a version for reading, or shares the open one.
func (v *volumeSet) openVersion(ctx context.Context, r catalog.Medium, version string) (nbd.Device, nbd.Info, error) {
	spec, err := medium.ParseSpec(version)
	if err != nil {
		return nil, nbd.Info{}, err
	}
	if err := v.settled(ctx, r.ID); err != nil {
		return nil, nbd.Info{}, err
	}
	view, err := medium.OpenView(ctx, v.options(), r.ID, spec)
	if err != nil {
		return nil, nbd.Info{}, fmt.Errorf("open %s@%s: %w", r.Name, version, err)
	}
	key := viewKey{r.ID, view.Version().Number}
	info := versionInfo(r, view.Version())
	if w := v.shareView(key); w != nil {
		return w.dev, info, view.Close(ctx)
	}
	w, err := v.newView(ctx, key, view)
	if err != nil {
		return nil, nbd.Info{}, errors.Join(fmt.Errorf("open %s@%s: %w", r.Name, version, err), view.Close(ctx))
	}
	v.mu.Lock()
	if other := v.mu.views[key]; other != nil || v.mu.closed {
		v.mu.Unlock()
		err := v.endView(w)
		if w = v.shareView(key); w == nil {
			return nil, nbd.Info{}, errors.Join(err, fmt.Errorf("open %s@%s: %w", r.Name, version, atoll.ErrClosed))
		}
		return w.dev, info, nil
	}
	w.refs = 1
	v.mu.views[key], v.mu.viewed[w.dev] = w, w
	v.mu.Unlock()
	return w.dev, info, nil
}

// settled waits until versions that were made here just now can be read by
// others.
func (v *volumeSet) settled(ctx context.Context, id atoll.MediumID) error {
	v.mu.Lock()
	o := v.mu.open[id]
	v.mu.Unlock()
	if o == nil || !o.usable() {
		return nil
	}
	return o.vol.Settled(ctx)
}

// newView makes a device of a view.
func (v *volumeSet) newView(ctx context.Context, key viewKey, view *medium.View) (*openView, error) {
	vol, err := volume.OpenVersion(ctx, view, volume.Options{
		Cache: v.cache, MapBytes: v.share(8, 1<<20), Log: v.s.log.With("medium", key.id), Metrics: v.s.metrics.volume,
	})
	if err != nil {
		return nil, err
	}
	w := &openView{key: key, view: view, vol: vol}
	w.dev = &device{Volume: vol, ops: v.s.metrics.ops, number: key.number, state: view.State}
	return w, nil
}

// shareView adds a user to a view that is open.
func (v *volumeSet) shareView(key viewKey) *openView {
	v.mu.Lock()
	defer v.mu.Unlock()
	w := v.mu.views[key]
	if w == nil || !w.view.Valid() {
		return nil
	}
	w.refs++
	return w
}

// releaseView gives a view back; the last user closes it.
func (v *volumeSet) releaseView(w *openView) {
	v.mu.Lock()
	w.refs--
	last := w.refs == 0
	if last {
		delete(v.mu.viewed, w.dev)
		if v.mu.views[w.key] == w {
			delete(v.mu.views, w.key)
		}
	}
	closed := v.mu.closed
	v.mu.Unlock()
	if last && !closed {
		v.wg.Go(func() { _ = v.endView(w) })
	} else if last {
		_ = v.endView(w)
	}
}

// endView closes a view that is not in the set any more.
func (v *volumeSet) endView(w *openView) error {
	ctx, cancel := context.WithTimeout(v.closing, closeTimeout)
	defer cancel()
	err := w.vol.Close(ctx)
	return errors.Join(err, w.view.Close(ctx))
}

// dropViews forgets all views: the session is lost, and with it what kept their
// versions. Their users are disconnected and come again.
func (v *volumeSet) dropViews() {
	v.mu.Lock()
	clear(v.mu.views)
	v.mu.Unlock()
	if v.s.nbd == nil {
		return
	}
	for _, c := range v.s.nbd.Connections() {
		if name, version, _ := splitName(c.Export); name != "" && version != "" {
			v.s.nbd.Disconnect(c.ID)
		}
	}
}

// closeViews closes the views that are left when the server stops.
func (v *volumeSet) closeViews() {
	v.mu.Lock()
	all := v.mu.viewed
	v.mu.viewed = map[nbd.Device]*openView{}
	clear(v.mu.views)
	v.mu.Unlock()
	for _, w := range all {
		_ = v.endView(w)
	}
}

// splitSpec takes NAME@VERSION apart; the zero spec is the working state.
func splitSpec(text string) (name string, spec medium.VersionSpec, err error) {
	name, version, found := strings.Cut(text, "@")
	if !found {
		return name, spec, nil
	}
	spec, err = medium.ParseSpec(version)
	return name, spec, err
}
