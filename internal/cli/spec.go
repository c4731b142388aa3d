package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// Words that name a version by its role.
const (
	versionCur     = "cur"
	versionLast    = "last"
	versionRelease = "release"
)

// spec names a volume, and perhaps one of its versions: NAME[@VERSION].
type spec struct{ name, version string }

// String returns the spec as users write it.
func (s spec) String() string {
	if s.version == "" {
		return s.name
	}
	return s.name + "@" + s.version
}

// parseSpec splits NAME[@VERSION]; the optional prefix "vol/" is taken off.
func parseSpec(arg string) (spec, error) {
	name, version, at := strings.Cut(volumeName(arg), "@")
	switch {
	case name == "":
		return spec{}, usagef("%q names no volume; want NAME or NAME@VERSION", arg)
	case at && version == "":
		return spec{}, usagef("%q names no version; want NAME@VERSION", arg)
	case strings.Contains(version, "@") || strings.Contains(version, "/"):
		return spec{}, usagef("%q: want NAME@VERSION with one @ and no / behind it", arg)
	}
	return spec{name, version}, nil
}

// snapFlag is rbd's way to name a version apart from its volume.
type snapFlag struct{ snap string }

func (f *snapFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.snap, "snap", "", "the version, instead of NAME@VERSION")
}

// spec reads arg, which may leave the version to --snap.
func (f *snapFlag) spec(arg string) (spec, error) {
	s, err := parseSpec(arg)
	switch {
	case err != nil || f.snap == "":
		return s, err
	case s.version != "" && s.version != f.snap:
		return s, usagef("%q and --snap %s name two versions", arg, f.snap)
	}
	return parseSpec(s.name + "@" + f.snap)
}

// version is spec for commands that need a version.
func (f *snapFlag) version(arg string) (spec, error) {
	s, err := f.spec(arg)
	if err == nil && s.version == "" {
		err = usagef("%q names no version; want NAME@VERSION, as in %s@last", arg, s.name)
	}
	return s, err
}

// versionName is what a version is called: its name, or else its number.
func versionName(v *atollv1.Version) string {
	if v.Name != "" {
		return v.Name
	}
	return strconv.FormatUint(v.Number, 10)
}

// temporaryProperty marks versions that a command made for itself.
const temporaryProperty = "atoll.temporary"

// visible leaves out the versions that are not the user's.
func visible(all []*atollv1.Version) []*atollv1.Version {
	var out []*atollv1.Version
	for _, v := range all {
		if !v.Deleting && !v.Internal && v.Properties[temporaryProperty] == "" {
			out = append(out, v)
		}
	}
	return out
}

// findVersion looks a version up as the server would; nil if it is not there.
func findVersion(r *atollv1.ListVersionsResponse, name string) *atollv1.Version {
	number, err := strconv.ParseUint(name, 10, 64)
	switch {
	case err == nil:
	case name == versionLast:
		number = r.Last
	case name == versionRelease:
		number = r.Release
	}
	for _, v := range r.Versions {
		if number != 0 && v.Number == number || number == 0 && name != "" && v.Name == name {
			return v
		}
	}
	return nil
}

// moment formats a time for people.
func moment(t time.Time) string { return t.Local().Format(time.DateTime) }
