package curve

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/atoll"
)

// snapCode is a result of Curve's snapshot server; all but 0 are negative.
type snapCode int

const (
	snapOK            snapCode = 0
	snapInternal      snapCode = -1
	snapBadRequest    snapCode = -5
	snapInvalidUser   snapCode = -7
	snapNotExist      snapCode = -8
	snapBadStatus     snapCode = -9
	snapNameMismatch  snapCode = -11
	snapCancelDone    snapCode = -14
	snapInvalid       snapCode = -15
	snapInUse         snapCode = -16
	snapUnfinished    snapCode = -17
	snapLimit         snapCode = -18
	snapFileExist     snapCode = -19
	snapNotSupported  snapCode = -21
	maxSnapshots               = 1024
	snapDeadlineTimes          = 4
)

// snapMessage is what the snapshot server says to a code.
func snapMessage(c snapCode) string {
	return map[snapCode]string{
		snapOK: "Exec success.", snapInternal: "Internal error.", snapBadRequest: `BadRequest:"Invalid request."`,
		snapInvalidUser: "Invalid user.", snapNotExist: "File not exist.", snapBadStatus: "File status invalid.",
		snapNameMismatch: "FileName not match.", snapCancelDone: "Cannot cancel finished.", snapInvalid: "Invalid snapshot.",
		snapInUse: "Cannot delete when using.", snapUnfinished: "Cannot clean task unfinished.",
		snapLimit: "Snapshot count reach the limit.", snapFileExist: "File exist.", snapNotSupported: "Not support.",
	}[c]
}

// Error returns the message.
func (c snapCode) Error() string { return snapMessage(c) }

// snapCodeOf returns the code of an error.
func snapCodeOf(err error) snapCode {
	if err == nil {
		return snapOK
	}
	var c snapCode
	if errors.As(err, &c) {
		return c
	}
	switch CodeOf(err) {
	case NotExist:
		return snapNotExist
	case AuthFail:
		return snapInvalidUser
	case Exists:
		return snapFileExist
	case FileOccupied:
		return snapBadStatus
	case NotSupport:
		return snapNotSupported
	}
	return snapInternal
}

// answer is what an action adds to the reply.
type answer map[string]any

// snapFunc carries out one action.
type snapFunc func(*Gateway, context.Context, url.Values, answer) error

// action is a row of the table of actions: what does it, and which parameters
// must be there.
type action struct {
	fn   snapFunc
	must []string
}

// actions is the table of actions; the last three are for administrators.
func actions() map[string]action {
	return map[string]action{
		"CreateSnapshot":      {(*Gateway).createSnapshot, []string{"User", "File", "Name"}},
		"DeleteSnapshot":      {(*Gateway).deleteSnapshot, []string{"User", "UUID"}},
		"CancelSnapshot":      {(*Gateway).cancelSnapshot, []string{"User", "UUID", "File"}},
		"GetFileSnapshotInfo": {(*Gateway).snapshotInfo, []string{"User"}},
		"Clone":               {(*Gateway).cloneFile, []string{"User", "Source", "Destination", "Lazy"}},
		"Recover":             {(*Gateway).recoverFile, []string{"User", "Source", "Destination", "Lazy"}},
		"Flatten":             {(*Gateway).flatten, []string{"User", "UUID"}},
		"GetCloneTasks":       {(*Gateway).cloneTasks, []string{"User"}},
		"CleanCloneTask":      {(*Gateway).cleanTask, []string{"User", "UUID"}},
		"GetFileSnapshotList": {(*Gateway).snapshotList, nil},
		"GetCloneTaskList":    {(*Gateway).taskList, nil},
		"GetCloneRefStatus":   {(*Gateway).refStatus, []string{"User", "Source"}},
	}
}

// serveSnapshots answers the REST interface of Curve's snapshot server.
func (g *Gateway) serveSnapshots(w http.ResponseWriter, r *http.Request, strict bool) {
	start := time.Now()
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		w.Header().Set("Allow", "GET, POST")
		http.Error(w, "want GET", http.StatusMethodNotAllowed)
		return
	}
	q := r.URL.Query()
	name := q.Get("Action")
	act, known := actions()[name]
	if !known {
		name = "unknown"
	}
	out := answer{"RequestId": newUUID()}
	err := snapError(act.check(q, known))
	if err == nil {
		ctx, cancel := context.WithTimeout(r.Context(), snapDeadlineTimes*g.o.Deadline)
		defer cancel()
		if err = g.authenticateREST(ctx, r, q, strict); err == nil {
			err = act.fn(g, ctx, q, out)
		}
	}
	code := snapCodeOf(err)
	status := http.StatusOK
	switch {
	case code == snapBadRequest:
		status = http.StatusBadRequest
	case code != snapOK:
		status = http.StatusInternalServerError
	}
	if code != snapOK {
		g.o.Log.Debug("snapshot call refused", "call", name, "code", int(code), "err", err)
		out = answer{"RequestId": out["RequestId"], "UUID": ""}
	}
	out["Code"], out["Message"] = strconv.Itoa(int(code)), snapMessage(code)
	g.o.Metrics.done("snapshot", name, int(code), time.Since(start))
	writeJSON(w, status, out)
}

// snapError makes an error of a code, nil of 0.
func snapError(c snapCode) error {
	if c == snapOK {
		return nil
	}
	return c
}

// check refuses a request with a parameter missing, empty or of the wrong form.
func (a action) check(q url.Values, known bool) snapCode {
	if !known || q.Get("Version") == "" {
		return snapBadRequest
	}
	for _, name := range a.must {
		if q.Get(name) == "" {
			return snapBadRequest
		}
		if _, ok := parseBool(q.Get(name)); name == "Lazy" && !ok {
			return snapBadRequest
		}
	}
	for _, name := range []string{"Limit", "Offset"} {
		if v := q.Get(name); v != "" {
			if _, err := strconv.ParseUint(v, 10, 31); err != nil {
				return snapBadRequest
			}
		}
	}
	return snapOK
}

// parseBool reads the spellings that Curve's server takes.
func parseBool(s string) (value, ok bool) {
	switch s {
	case "true", "True", "TRUE", "1":
		return true, true
	case "false", "False", "FALSE", "0":
		return false, true
	}
	return false, false
}

// authenticateREST asks those users for their password who must prove it. The
// interface knows no passwords: they come as HTTP Basic authentication. Root
// is believed as by Curve's server, unless its password is another than the one
// that everyone knows.
func (g *Gateway) authenticateREST(ctx context.Context, r *http.Request, q url.Values, strict bool) error {
	name := q.Get("User")
	switch {
	case name == "" && strict:
		name = rootUser // what asks for no user tells about all
	case name == "":
		return nil
	}
	user, err := g.user(ctx, name)
	if err != nil {
		return err
	}
	own := user.GetHasPassword() || g.o.RootPassword != DefaultRootPassword
	if !strict && !user.GetStrict() && !(name == rootUser && own) {
		return nil
	}
	who, password, _ := r.BasicAuth()
	if who != name {
		return snapInvalidUser
	}
	return g.authenticate(ctx, &call{Owner: name, Password: password, strict: strict})
}

// page cuts the part out of a list that was asked for and adds it.
func page[T any](q url.Values, out answer, key string, all []T) {
	limit, offset := 10, 0
	if v := q.Get("Limit"); v != "" {
		limit, _ = strconv.Atoi(v)
	}
	if v := q.Get("Offset"); v != "" {
		offset, _ = strconv.Atoi(v)
	}
	out["TotalCount"] = len(all)
	offset = min(offset, len(all))
	if part := all[offset:min(len(all), offset+limit)]; len(part) > 0 {
		out[key] = part
	} else {
		out[key] = nil
	}
}

// Properties of versions that are snapshots of this interface.
const (
	propSnapUser = "curve.user"
	propSnapName = "curve.name"
	propInternal = "curve.internal"
)

// Snapshot is what the snapshot server tells of one.
type Snapshot struct {
	UUID       string
	User       string
	File       string
	SeqNum     uint64
	Name       string
	Time       int64 // microseconds
	FileLength int64
	Status     int
	Progress   int
}

// snapshotOf makes a Snapshot of a version; ok is false for versions that were
// not made here, or are going.
func snapshotOf(medium, path string, v *atollv1.Version) (s Snapshot, ok bool) {
	user := v.Properties[propSnapUser]
	if user == "" || v.Deleting || v.Properties[propInternal] != "" {
		return s, false
	}
	return Snapshot{
		UUID: packUUID(medium, kindSnapshot, v.Number), User: user, File: "/" + path, SeqNum: v.Number,
		Name: v.Properties[propSnapName], Time: v.Time.AsTime().UnixMicro(), FileLength: v.SizeBytes, Progress: 100,
	}, true
}

// snapshotsOf lists the snapshots of a volume.
func (g *Gateway) snapshotsOf(ctx context.Context, medium, path string) ([]Snapshot, error) {
	resp, err := g.b.ListVersions(ctx, &atollv1.ListVersionsRequest{Name: path})
	if err != nil {
		return nil, err
	}
	var out []Snapshot
	for _, v := range resp.Versions {
		if s, ok := snapshotOf(medium, path, v); ok {
			out = append(out, s)
		}
	}
	return out, nil
}

// hasSnapshots reports whether a volume has snapshots of this interface.
func (g *Gateway) hasSnapshots(ctx context.Context, n *node) (bool, error) {
	if n.entry.Properties[propSnapshots] == "" {
		return false, nil
	}
	all, err := g.snapshotsOf(ctx, n.entry.Id, n.path)
	return len(all) > 0, err
}

// file finds a volume for the snapshot interface and proves its owner; root
// owns all.
func (g *Gateway) file(ctx context.Context, user, path string) (*node, error) {
	if checkPath(path) != nil {
		return nil, snapInternal
	}
	if err := g.own(ctx, &call{Owner: user}, path); err != nil {
		return nil, err
	}
	n, err := g.find(ctx, path)
	if err == nil && (n.dir() || n.trash != nil) {
		err = snapNotSupported
	}
	return n, err
}

// createSnapshot keeps the present state of a volume, at once.
func (g *Gateway) createSnapshot(ctx context.Context, q url.Values, out answer) error {
	n, err := g.file(ctx, q.Get("User"), q.Get("File"))
	if err != nil {
		return err
	}
	have, err := g.snapshotsOf(ctx, n.entry.Id, n.path)
	if err != nil {
		return err
	}
	if len(have) >= maxSnapshots {
		return snapLimit
	}
	if err := g.note(ctx, n, propSnapshots); err != nil {
		return err
	}
	v, err := g.makeVersion(ctx, n.path, q.Get("Name"), map[string]string{propSnapUser: q.Get("User"), propSnapName: q.Get("Name")})
	if err != nil {
		return err
	}
	out["UUID"] = packUUID(n.entry.Id, kindSnapshot, v.Number)
	return nil
}

// makeVersion makes a version under its name, or under none if that is taken or
// none that Atoll would have: Curve's names need not be unique.
func (g *Gateway) makeVersion(ctx context.Context, path, name string, props map[string]string) (*atollv1.Version, error) {
	for {
		resp, err := g.b.CreateVersion(ctx, &atollv1.CreateVersionRequest{Media: []string{path}, Name: name, Memo: props[propSnapName], Properties: props})
		if name != "" && (errors.Is(err, atoll.ErrExist) || errors.Is(err, atoll.ErrInvalid)) {
			name = ""
			continue
		}
		if err != nil {
			return nil, err
		}
		if len(resp.Versions) != 1 {
			return nil, snapInternal
		}
		return resp.Versions[0], nil
	}
}

// note sets a mark among a volume's properties.
func (g *Gateway) note(ctx context.Context, n *node, key string) error {
	if n.entry.Properties[key] != "" {
		return nil
	}
	_, err := g.b.SetProperties(ctx, &atollv1.SetPropertiesRequest{Path: n.path, Properties: map[string]string{key: "1"}})
	return err
}

// snapshot finds a snapshot by its UUID.
func (g *Gateway) snapshot(ctx context.Context, uuid string) (s Snapshot, n *node, err error) {
	medium, number, ok := unpackUUID(uuid, kindSnapshot)
	if !ok {
		return s, nil, snapNotExist
	}
	e, err := g.b.GetEntry(ctx, &atollv1.GetEntryRequest{Id: medium})
	if err != nil {
		return s, nil, err
	}
	n = &node{File: fileOf(e), path: e.Path, entry: e}
	all, err := g.snapshotsOf(ctx, medium, e.Path)
	if err != nil {
		return s, nil, err
	}
	for _, s := range all {
		if s.SeqNum == number {
			return s, n, nil
		}
	}
	return s, nil, snapNotExist
}

// deleteSnapshot removes a snapshot. One that is not there is removed already.
func (g *Gateway) deleteSnapshot(ctx context.Context, q url.Values, _ answer) error {
	s, n, err := g.snapshot(ctx, q.Get("UUID"))
	switch {
	case snapCodeOf(err) == snapNotExist:
		return nil
	case err != nil:
		return err
	case s.User != q.Get("User"):
		return snapInvalidUser
	case q.Get("File") != "" && s.File != q.Get("File"):
		return snapNameMismatch
	}
	name := versionName(n.path, s.SeqNum)
	kids, err := g.b.ListChildren(ctx, &atollv1.ListChildrenRequest{Name: name})
	if err != nil {
		return err
	}
	if len(kids.Children) > 0 {
		return snapInUse
	}
	_, err = g.b.DeleteVersion(ctx, &atollv1.DeleteVersionRequest{Name: name})
	if errors.Is(err, atoll.ErrBusy) {
		return snapInUse
	}
	return err
}

func versionName(path string, number uint64) string {
	return path + "@" + strconv.FormatUint(number, 10)
}

// cancelSnapshot has nothing to cancel: a snapshot is there when it was asked for.
func (g *Gateway) cancelSnapshot(context.Context, url.Values, answer) error { return snapCancelDone }

// snapshotInfo tells of one snapshot, of those of a file, or of all of a user.
func (g *Gateway) snapshotInfo(ctx context.Context, q url.Values, out answer) error {
	user, file := q.Get("User"), q.Get("File")
	if q.Has("UUID") {
		s, _, err := g.snapshot(ctx, q.Get("UUID"))
		switch {
		case err != nil:
			return err
		case s.User != user:
			return snapInvalidUser
		case file != "" && s.File != file:
			return snapNameMismatch
		}
		page(q, out, "Snapshots", []Snapshot{s})
		return nil
	}
	all, err := g.allSnapshots(ctx, file)
	if err != nil {
		return err
	}
	page(q, out, "Snapshots", keep(all, func(s Snapshot) bool { return s.User == user }))
	return nil
}

// allSnapshots lists those of one file, or of all volumes that ever had any.
func (g *Gateway) allSnapshots(ctx context.Context, file string) (out []Snapshot, err error) {
	if file != "" {
		n, err := g.file(ctx, rootUser, file)
		if err != nil || n.entry.Properties[propSnapshots] == "" {
			if snapCodeOf(err) == snapNotExist || checkPath(file) != nil {
				err = nil // no file, no snapshots
			}
			return nil, err
		}
		return g.snapshotsOf(ctx, n.entry.Id, n.path)
	}
	err = g.eachVolume(ctx, func(v *atollv1.Volume) error {
		if v.Properties[propSnapshots] == "" {
			return nil
		}
		some, err := g.snapshotsOf(ctx, v.Id, v.Name)
		out = append(out, some...)
		return err
	})
	return out, err
}

// snapshotList is snapshotInfo for administrators: any user, with filters.
func (g *Gateway) snapshotList(ctx context.Context, q url.Values, out answer) error {
	all, err := g.allSnapshots(ctx, q.Get("File"))
	if err != nil {
		return err
	}
	page(q, out, "Snapshots", keep(all, func(s Snapshot) bool {
		return matches(q, "UUID", s.UUID) && matches(q, "User", s.User) && matches(q, "Status", strconv.Itoa(s.Status))
	}))
	return nil
}

// matches reports whether a filter is absent or names the value.
func matches(q url.Values, key, value string) bool { return q.Get(key) == "" || q.Get(key) == value }

func keep[T any](all []T, fn func(T) bool) (out []T) {
	for _, x := range all {
		if fn(x) {
			out = append(out, x)
		}
	}
	return out
}

// eachVolume calls fn with every volume until it fails.
func (g *Gateway) eachVolume(ctx context.Context, fn func(*atollv1.Volume) error) error {
	const some = 500
	for after := ""; ; {
		vols, err := g.b.Volumes(ctx, after, some)
		if err != nil {
			return err
		}
		for _, v := range vols {
			if err := fn(v); err != nil {
				return err
			}
		}
		if len(vols) < some {
			return nil
		}
		after = vols[len(vols)-1].Name
	}
}
